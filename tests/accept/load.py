"""guidellm against ROOT_URL, MODEL and MODEL_DIR; exits 1 unless every request came through.

Run by the Python that has guidellm. Its report goes into the folder that the command line names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REQUESTS, PROMPT, OUTPUT, STREAMS = 40, 64, 16, 4

report = Path(sys.argv[1]) / "report.json"
report.unlink(missing_ok=True)
target = f"kind=openai_http,target={os.environ['ROOT_URL']},model={os.environ['MODEL']}"
code = subprocess.run(
    [
        *(Path(sys.executable).with_name("guidellm"), "run", "--disable-progress"),
        *("--backend", target),
        *("--tokenizer", f"kind=hf_auto,model={os.environ['MODEL_DIR']}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--output", f"kind=json,path={report}"),
    ]
).returncode
if code:
    sys.exit(code)
(run,) = json.loads(report.read_text())["benchmarks"]
metrics = run["metrics"]
totals = metrics["request_totals"]
tokens = metrics["output_token_count"]["successful"]["total_sum"]
speed = metrics["output_tokens_per_second"]["total"]["mean"]
first, between = (
    metrics[name]["successful"]["median"]
    for name in ("time_to_first_token_ms", "inter_token_latency_ms")
)
sys.stdout.write(
    f"{totals}, {tokens:.0f} tokens, {speed:.1f} tokens/s, TTFT {first:.0f} ms, ITL {between:.1f} ms\n"
)
good = (
    totals["successful"] == totals["total"] == REQUESTS
    and tokens == REQUESTS * OUTPUT
    and min(speed, first, between) > 0
)
sys.exit(not good)
