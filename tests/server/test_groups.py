"""Process groups: what one group adds, gathers and tells stays in it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from asyncllm.topology import FOLLOWER, LEADER, Endpoint, Topology

# two groups of two ranks; in the second the later endpoint is the first rank
TOPOLOGY = Topology(
    tuple(
        Endpoint(
            id=i, roles=(FOLLOWER if rank else LEADER,), device=i, group=group, group_rank=rank
        )
        for i, (group, rank) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0)])
    )
)
RANK = """
import json, sys
import torch
from asyncllm.engine.parallel import Ranks
from asyncllm.topology import Topology

topology = Topology.from_plain(json.loads(sys.argv[1]))
me = topology[int(sys.argv[2])]
fd = int(sys.argv[4])
ranks = Ranks(
    topology, me, ("127.0.0.1", int(sys.argv[3])), torch.device("cpu"), fd if fd >= 0 else None
)
group = ranks.group
mine = torch.full((1, 1), float(me.id))
told = group.broadcast(mine.clone())
summed = group.linear_reduce(lambda x, out=None: x.clone(), mine)
got = [group.minimum(me.id), ranks.minimum(me.id + 5), int(told), int(summed), group.gather_last(mine).tolist()[0]]
sys.stdout.write(json.dumps([group.rank, group.size, *got]))
torch.distributed.barrier()  # the first rank keeps what all read until they have
ranks.close()
"""


def test_each_group_computes_by_itself() -> None:
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
    # rank, size, minimum of the group and of all, what the first rank told, sum, all of the group in order
    assert said[0] == [0, 2, 0, 5, 0, 1, [0.0, 1.0]]
    assert said[1] == [1, 2, 0, 5, 0, 1, [0.0, 1.0]]
    assert said[2] == [1, 2, 2, 5, 3, 5, [3.0, 2.0]]
    assert said[3] == [0, 2, 2, 5, 3, 5, [3.0, 2.0]]
