"""Process groups: what one group adds, gathers and tells stays in it, but for experts of all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace

from asyncllm.server.loading import share_memory
from asyncllm.topology import FOLLOWER, LEADER, LOCKSTEP, Endpoint, Topology

# two groups of two ranks that step together; in the second the later endpoint is the first rank
TOPOLOGY = Topology(
    tuple(
        Endpoint(
            id=i,
            roles=(FOLLOWER if rank else LEADER, *(() if i else (LOCKSTEP,))),
            device=i,
            group=group,
            group_rank=rank,
        )
        for i, (group, rank) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0)])
    )
)
RANK = """
import json, sys
import torch
from asyncllm.engine.parallel import Ranks, SymmetricSum, meet
from asyncllm.topology import Topology

topology = Topology.from_plain(json.loads(sys.argv[1]))
me = topology[int(sys.argv[2])]
fd = int(sys.argv[4])
store = meet(topology, me, ("127.0.0.1", int(sys.argv[3])), fd if fd >= 0 else None)
ranks = Ranks(topology, me, store, torch.device("cpu"))
group = ranks.group
mine = torch.full((1, 1), float(me.id))
told = group.broadcast(mine.clone())
summed = group.linear_reduce(lambda x, out=None: x.clone(), mine)
rows = torch.tensor([[me.group], [10.0 + me.group]])  # two of its group's
seen = []
def product(x, out=None):
    seen.append(x.flatten().tolist())
    return x * (1.0 + ranks.world.rank)
own = ranks.world.sum_tokens(product, ranks.world.gather_tokens(rows)).flatten().tolist()
class Symmetric(SymmetricSum):  # whose memory nobody has mapped
    def __init__(self):
        self._buffers, self._turn = [torch.full((8, 1), float("nan")) for _ in range(2)], 0
    def _sum(self, x):
        torch.distributed.all_reduce(x)
        return x
ranks.world._every.symmetric = Symmetric()
same = ranks.world.sum_tokens(
    lambda x, out: torch.mul(x, 1.0 + ranks.world.rank, out=out), ranks.world.gather_tokens(rows)
)
assert same.flatten().tolist() == own
flags = ranks.world.gather_flags(torch.tensor([me.group, 1], dtype=torch.int32)).tolist()
assert flags == [0, 1, 1, 1]
got = [group.minimum(me.id), ranks.minimum(me.id + 5), int(told), int(summed)]
together = [ranks.world.rank, ranks.world.size, *seen, own]
said = [group.rank, group.size, *got, group.gather_last(mine).tolist()[0]], together
sys.stdout.write(json.dumps(said))
torch.distributed.barrier()  # the first rank keeps what all read until they have
ranks.close()
"""


def test_each_group_computes_by_itself_and_all_add_up_experts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        plain, port = json.dumps(TOPOLOGY.to_plain()), str(sock.getsockname()[1])
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, plain, str(i), port, str(-1 if i else sock.fileno())],
                stdout=subprocess.PIPE,
                pass_fds=() if i else (sock.fileno(),),
            )
            for i in range(4)
        ]
        try:
            said = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    apart = [each for each, _ in said]
    # rank, size, minimum of the group and of all, what the first rank told, sum, all of the group
    assert apart[0] == [0, 2, 0, 5, 0, 1, [0.0, 1.0]]
    assert apart[1] == [1, 2, 0, 5, 0, 1, [0.0, 1.0]]
    assert apart[2] == [1, 2, 2, 5, 3, 5, [3.0, 2.0]]
    assert apart[3] == [0, 2, 2, 5, 3, 5, [3.0, 2.0]]
    # place among all, how many, the tokens of all groups, the sums of the own group's
    every = [0.0, 10.0, 1.0, 11.0]
    assert [together for _, together in said] == [
        [0, 4, every, [0.0, 100.0]],
        [1, 4, every, [0.0, 100.0]],
        [3, 4, every, [10.0, 110.0]],
        [2, 4, every, [10.0, 110.0]],
    ]


def test_memory_is_shared_by_those_only_who_sum_on_one_node() -> None:
    def placed(*nodes: int) -> Topology:
        pairs = zip(TOPOLOGY.endpoints, nodes, strict=True)
        return Topology(tuple(replace(each, node=node) for each, node in pairs))

    def apart(topology: Topology) -> Topology:
        """Groups that do not step together."""
        roles = [tuple(r for r in each.roles if r != LOCKSTEP) for each in topology.endpoints]
        pairs = zip(topology.endpoints, roles, strict=True)
        return Topology(tuple(replace(each, roles=own) for each, own in pairs))

    for topology, wanted in [
        (placed(0, 0, 0, 0), (True, True)),
        (placed(0, 0, 1, 1), (False, False)),  # experts are summed over all
        (apart(placed(0, 0, 1, 1)), (True, True)),
        (apart(placed(0, 1, 1, 1)), (False, True)),
    ]:
        assert tuple(share_memory(topology, group) for group in (0, 1)) == wanted
