"""Verify checkpoints: every file against the SHA-256 that was written when it was saved.

    python tools/verify_checkpoint.py runs/mine                  the one that a run would load
    python tools/verify_checkpoint.py runs/mine --all            each one
    python tools/verify_checkpoint.py runs/mine/iter_0000030     that one
    python tools/verify_checkpoint.py --seal OTHER/iter_0000030  write a manifest for one that has none

Exit code 0: all checkpoints are valid. 1: at least one is not. 2: a mistake in the command.

Hashes detect what is incomplete or corrupt, not who wrote it: weights may come from anyone, and pickles may name
classes that no checkpoint has, which a run refuses. Load and seal checkpoints only from trusted folders. This tool
unpickles nothing.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_hybrid.cli import tool
from megatron_hybrid.run_folder.verify_checkpoints import check, line, seal, to_check


def main() -> None:
    parser = tool.parser(__doc__)
    parser.add_argument("folder", type=Path, help="the --save folder of a run, or the folder of one checkpoint")
    parser.add_argument("--all", action="store_true", help="of a run: every checkpoint, newest first")
    parser.add_argument("--seal", action="store_true", help="write the manifest of a checkpoint that has none")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    args = parser.parse_args()
    folders = to_check(args.folder, args.all)
    if args.seal:
        seal(args.folder, folders)
    findings = []
    for folder in folders:
        findings.append(check(folder))
        if not args.json:
            print(line(findings[-1]), flush=True)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    sys.exit(1 if any(finding.problems for finding in findings) else 0)


if __name__ == "__main__":
    tool.run(main)
