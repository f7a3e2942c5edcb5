"""Where a step goes in the rows of the peers' table that miss their ratio, by operator.

ONNX Runtime's own profile of our decode graphs on the stack m4. Profiling costs a little: shares
count, not the sum.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import stack
from op_profile import profile_bundle
from table import Report, bench_arguments, show
from verbs import exported

from mla_deploy.bench.provenance import provenance
from mla_deploy.bundle import open_bundle

_STEPS = (("fp32", 512), ("int4", 512), ("int8", 512), ("int8-cache", 32768), ("fp32", 8192))


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    report = Report("peers: where a step goes", provenance(options.threads, layers=options.layers))
    with tempfile.TemporaryDirectory(prefix="bench-missed-") as folder:
        work = options.work or Path(folder)
        checkpoint = stack.kept_m4(work, options.layers)
        for form, context in _STEPS:
            bundle = open_bundle(exported(checkpoint, form, work))
            report.rows += profile_bundle(
                bundle, context, threads=options.threads, realtime=options.realtime, name=form
            )
    show(report, options.json)


if __name__ == "__main__":
    main()
