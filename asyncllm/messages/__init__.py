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
from asyncllm.messages.cluster import NodesAnswer as NodesAnswer
from asyncllm.messages.cluster import Serving as Serving
from asyncllm.messages.disaggregation import BeginDecode as BeginDecode
from asyncllm.messages.disaggregation import CancelTransfer as CancelTransfer
from asyncllm.messages.disaggregation import DecodeRequest as DecodeRequest
from asyncllm.messages.disaggregation import DecodeReserved as DecodeReserved
from asyncllm.messages.disaggregation import ExportKv as ExportKv
from asyncllm.messages.disaggregation import ImportKv as ImportKv
from asyncllm.messages.disaggregation import ImportPlaced as ImportPlaced
from asyncllm.messages.disaggregation import KvArrived as KvArrived
from asyncllm.messages.disaggregation import KvComputed as KvComputed
from asyncllm.messages.disaggregation import KvSent as KvSent
from asyncllm.messages.disaggregation import NodeState as NodeState
from asyncllm.messages.disaggregation import PrefillRequest as PrefillRequest
from asyncllm.messages.disaggregation import StepFinished as StepFinished
from asyncllm.messages.disaggregation import TransferFailed as TransferFailed
from asyncllm.messages.registry import AnnounceMaster as AnnounceMaster
from asyncllm.messages.registry import AskMasters as AskMasters
from asyncllm.messages.registry import FindRendezvous as FindRendezvous
from asyncllm.messages.registry import LeaseDenied as LeaseDenied
from asyncllm.messages.registry import LeasePort as LeasePort
from asyncllm.messages.registry import MasterAddress as MasterAddress
from asyncllm.messages.registry import MasterList as MasterList
from asyncllm.messages.registry import PortLeased as PortLeased
from asyncllm.messages.registry import RendezvousFound as RendezvousFound
from asyncllm.messages.request import Abort as Abort
from asyncllm.messages.request import Accepted as Accepted
from asyncllm.messages.request import Cancel as Cancel
from asyncllm.messages.request import CompileGrammar as CompileGrammar
from asyncllm.messages.request import ConstraintsAdvanced as ConstraintsAdvanced
from asyncllm.messages.request import CountTokens as CountTokens
from asyncllm.messages.request import EventsRendered as EventsRendered
from asyncllm.messages.request import Finished as Finished
from asyncllm.messages.request import FlushStreams as FlushStreams
from asyncllm.messages.request import GrammarBuilt as GrammarBuilt
from asyncllm.messages.request import GrammarReady as GrammarReady
from asyncllm.messages.request import OpenTextStream as OpenTextStream
from asyncllm.messages.request import PromptEncoded as PromptEncoded
from asyncllm.messages.request import RequestsOrphaned as RequestsOrphaned
from asyncllm.messages.request import ResubmitRequests as ResubmitRequests
from asyncllm.messages.request import StopHit as StopHit
from asyncllm.messages.request import Submit as Submit
from asyncllm.messages.request import TextDelta as TextDelta
from asyncllm.messages.request import Tokenize as Tokenize
from asyncllm.messages.request import Tokens as Tokens
from asyncllm.messages.request import TokensCounted as TokensCounted
from asyncllm.messages.request import TokenTexts as TokenTexts
from asyncllm.messages.server import AllocatorStats as AllocatorStats
from asyncllm.messages.server import Drain as Drain
from asyncllm.messages.server import Drained as Drained
from asyncllm.messages.server import EndpointGone as EndpointGone
from asyncllm.messages.server import GroupFailed as GroupFailed
from asyncllm.messages.server import GroupRemoved as GroupRemoved
from asyncllm.messages.server import Halt as Halt
from asyncllm.messages.server import Hello as Hello
from asyncllm.messages.server import Probe as Probe
from asyncllm.messages.server import RequestServed as RequestServed
from asyncllm.messages.server import RunnerStats as RunnerStats
from asyncllm.messages.server import SchedulerStats as SchedulerStats
from asyncllm.messages.server import Scrape as Scrape
from asyncllm.messages.server import Scraped as Scraped
from asyncllm.messages.server import ServerLost as ServerLost
from asyncllm.messages.server import Started as Started
from asyncllm.messages.server import Welcome as Welcome
from asyncllm.messages.server import WorkerOverrun as WorkerOverrun
from asyncllm.messages.server import WorkerReplaced as WorkerReplaced
from asyncllm.messages.step import GroupProgress as GroupProgress
from asyncllm.messages.step import JoinStep as JoinStep
from asyncllm.messages.step import LaunchDue as LaunchDue
from asyncllm.messages.step import OfferStep as OfferStep
from asyncllm.messages.step import ReleaseSlots as ReleaseSlots
from asyncllm.messages.step import ReserveSlots as ReserveSlots
from asyncllm.messages.step import SlotsGranted as SlotsGranted
from asyncllm.messages.step import StepAgreed as StepAgreed
from asyncllm.messages.step import StepDone as StepDone
from asyncllm.messages.step import StepPlan as StepPlan
from asyncllm.messages.transfer import KvListening as KvListening
from asyncllm.messages.transfer import TransferStats as TransferStats
