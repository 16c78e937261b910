"""Every message that crosses an actor boundary, with its tag.

Commands are imperative, events are in the past tense. Columns are arrays of int32 unless a comment
says otherwise, and must not be modified once sent. ``rid`` is ``endpoint << 40 | counter`` of the
frontend that accepted the request; a *lane* is a request's row in the device tables; a *slot* is
the KV of one token. Tags are never reused. ``coordinator`` is the watchdog of the server's
coordinator, ``@leader`` an actor of the group's leader (see ``topology``).
"""

from asyncllm.messages.checks import FRONTEND_SHIFT as FRONTEND_SHIFT
from asyncllm.messages.checks import MAX_COUNT as MAX_COUNT
from asyncllm.messages.checks import MAX_RID as MAX_RID
from asyncllm.messages.cluster import AskNodes as AskNodes
from asyncllm.messages.cluster import AskServing as AskServing
from asyncllm.messages.cluster import DirectorStats as DirectorStats
from asyncllm.messages.cluster import NodesTold as NodesTold
from asyncllm.messages.cluster import Serving as Serving
from asyncllm.messages.moving import Arrived as Arrived
from asyncllm.messages.moving import Begin as Begin
from asyncllm.messages.moving import Computed as Computed
from asyncllm.messages.moving import Decode as Decode
from asyncllm.messages.moving import Export as Export
from asyncllm.messages.moving import Forget as Forget
from asyncllm.messages.moving import Import as Import
from asyncllm.messages.moving import Lapsed as Lapsed
from asyncllm.messages.moving import NodeState as NodeState
from asyncllm.messages.moving import Placed as Placed
from asyncllm.messages.moving import Prefill as Prefill
from asyncllm.messages.moving import Reserved as Reserved
from asyncllm.messages.moving import Sent as Sent
from asyncllm.messages.moving import StepOver as StepOver
from asyncllm.messages.registry import Announce as Announce
from asyncllm.messages.registry import AskMasters as AskMasters
from asyncllm.messages.registry import Claim as Claim
from asyncllm.messages.registry import Claimed as Claimed
from asyncllm.messages.registry import Denied as Denied
from asyncllm.messages.registry import MasterAt as MasterAt
from asyncllm.messages.registry import Masters as Masters
from asyncllm.messages.registry import Seek as Seek
from asyncllm.messages.registry import Sought as Sought
from asyncllm.messages.request import Abort as Abort
from asyncllm.messages.request import Accepted as Accepted
from asyncllm.messages.request import Again as Again
from asyncllm.messages.request import Cancel as Cancel
from asyncllm.messages.request import Compile as Compile
from asyncllm.messages.request import Compiled as Compiled
from asyncllm.messages.request import Count as Count
from asyncllm.messages.request import Counted as Counted
from asyncllm.messages.request import Delta as Delta
from asyncllm.messages.request import Finished as Finished
from asyncllm.messages.request import Flush as Flush
from asyncllm.messages.request import GrammarBuilt as GrammarBuilt
from asyncllm.messages.request import OpenTextStream as OpenTextStream
from asyncllm.messages.request import Orphaned as Orphaned
from asyncllm.messages.request import Prepared as Prepared
from asyncllm.messages.request import StopHit as StopHit
from asyncllm.messages.request import Submit as Submit
from asyncllm.messages.request import Tokenize as Tokenize
from asyncllm.messages.request import Tokens as Tokens
from asyncllm.messages.request import Worked as Worked
from asyncllm.messages.server import AllocatorStats as AllocatorStats
from asyncllm.messages.server import Drain as Drain
from asyncllm.messages.server import Drained as Drained
from asyncllm.messages.server import Gone as Gone
from asyncllm.messages.server import GroupGone as GroupGone
from asyncllm.messages.server import GroupLost as GroupLost
from asyncllm.messages.server import Halt as Halt
from asyncllm.messages.server import Hello as Hello
from asyncllm.messages.server import Lost as Lost
from asyncllm.messages.server import Probe as Probe
from asyncllm.messages.server import Replaced as Replaced
from asyncllm.messages.server import RequestServed as RequestServed
from asyncllm.messages.server import RunnerStats as RunnerStats
from asyncllm.messages.server import SchedulerStats as SchedulerStats
from asyncllm.messages.server import Scrape as Scrape
from asyncllm.messages.server import Scraped as Scraped
from asyncllm.messages.server import Started as Started
from asyncllm.messages.server import Welcome as Welcome
from asyncllm.messages.step import Agreed as Agreed
from asyncllm.messages.step import Granted as Granted
from asyncllm.messages.step import JoinStep as JoinStep
from asyncllm.messages.step import LaunchDue as LaunchDue
from asyncllm.messages.step import Offer as Offer
from asyncllm.messages.step import Progress as Progress
from asyncllm.messages.step import Release as Release
from asyncllm.messages.step import Reserve as Reserve
from asyncllm.messages.step import StepDone as StepDone
from asyncllm.messages.step import StepPlan as StepPlan
from asyncllm.messages.transfer import Listening as Listening
from asyncllm.messages.transfer import TransferStats as TransferStats
