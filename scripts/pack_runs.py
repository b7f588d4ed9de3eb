"""Take the results of a study's finished runs to another machine, without their weights.

python scripts/pack_runs.py pack FOLDER OUT [--part-mebibytes 15] [--numbers | --losses PATTERN]
python scripts/pack_runs.py unpack OUT FOLDER

FOLDER holds the runs, also in folders below; OUT gets an archive of their settings, metrics, evaluations and
measures, in parts of at most so many MiB. Where it is unpacked, `train.py` and `scripts/score_runs.py` pass
over these runs, and `scripts/length_study.py` reads them. Nothing that is there is overwritten.

With `--numbers` pages and pictures are left out, which are nine tenths of it. With `--losses` the archive
holds nothing but the nats of single targets of the runs whose names below FOLDER are like the pattern, such
as 'main/*'.
"""

import argparse
import shlex
import sys
from pathlib import Path

from out_argument import out_folder

from windowlm.errors import UserError, exit_status
from windowlm.study.packed_runs import pack_runs, unpack_runs

MEBIBYTE = 1 << 20


def main() -> int:
    """Pack or unpack as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write an archive")
    packing.add_argument("folder", metavar="FOLDER", type=Path)
    packing.add_argument("out", metavar="OUT", type=out_folder)
    packing.add_argument("--part-mebibytes", metavar="N", type=_positive, default=15)
    kinds = packing.add_mutually_exclusive_group()
    kinds.add_argument("--numbers", action="store_true", help="leave pages and pictures out")
    kinds.add_argument("--losses", metavar="PATTERN", help="of the names of runs")
    unpacking = commands.add_parser("unpack", help="add its runs to a folder")
    unpacking.add_argument("out", metavar="OUT", type=Path)
    unpacking.add_argument("folder", metavar="FOLDER", type=out_folder)
    given = parser.parse_args()
    if given.command == "pack":
        if not given.folder.is_dir():
            raise UserError(f"{given.folder}: there is no such folder; give the folder of the runs")
        count, parts = pack_runs(
            given.folder,
            given.out,
            given.part_mebibytes * MEBIBYTE,
            numbers=given.numbers,
            losses_of=given.losses,
        )
        print(f"{count} finished runs in")
        for part in parts:
            print(f"  {shlex.quote(str(part))}, {part.stat().st_size / MEBIBYTE:.1f} MiB")
        return 0
    found = unpack_runs(given.out, given.folder)
    print(
        f"{found.runs} runs in the archive; {found.written} files written to {shlex.quote(str(given.folder))}"
    )
    if found.kept:
        print(f"{len(found.kept)} files differ from those of the archive and stay as they are here:")
        print("  " + "\n  ".join(found.kept[:10]))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a whole number from 1 on; try 15")
    return int(text)


if __name__ == "__main__":
    sys.exit(exit_status(main))
