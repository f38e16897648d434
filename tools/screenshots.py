"""Pictures of a report, as Chromium shows its top on a desktop and on a phone.

Chromium has no window narrower than 500 pixels, so the page is put into a frame of its own in a larger one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from vmq.errors import MediaError, OptionError, VmqError
from vmq.files import check_output, write_atomic
from vmq.report import inspect_dump
from vmq.report_html import report_page

SHOWN = {1280: 2400, 390: 2600}
"""Width and height of each picture, in pixels."""
LARGER = 200
"""By how much the window is larger: Chromium keeps some of it for itself."""
STEP = 5
"""Colours are rounded to multiples of it, which makes the files half as large; white and grey stay what they are."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        files = {width: args.folder / f"report-{width}.png" for width in SHOWN}
        for file in files.values():
            check_output(file)
        with tempfile.TemporaryDirectory(prefix="vmq-screenshots-") as folder:
            page = args.report
            if page.is_dir():
                page = Path(folder) / "report.html"
                page.write_text(report_page(inspect_dump(args.report, with_blame=True)), encoding="utf-8")
            elif not page.is_file():
                raise MediaError(f"{page} is not there; give a dump, or the page that `vmq inspect --html` writes")
            for width, file in files.items():
                write_atomic(file, screenshot(page, width, SHOWN[width], Path(folder)))
                print(f"{file}: {width}x{SHOWN[width]}, {file.stat().st_size / 1e3:.0f} kB")
    except (VmqError, OSError, subprocess.SubprocessError) as error:
        print(f"screenshots: error: {error}", file=sys.stderr)
        return 2
    return 0


def screenshot(page: Path, width: int, height: int, folder: Path) -> bytes:
    """The top of a page, as a PNG of this many pixels; `folder` is for what Chromium writes."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise OptionError("Chromium was not found; install it, or Chrome")
    (folder / "frame.html").write_text(
        f'<!DOCTYPE html><body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
        f'style="border:0;width:{width}px;height:{height}px"></iframe>', encoding="utf-8")
    shown = folder / f"{width}.png"
    done = subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                           "--hide-scrollbars", "--force-device-scale-factor=1", "--force-color-profile=srgb",
                           "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000",
                           f"--user-data-dir={folder / 'profile'}", f"--screenshot={shown}",
                           f"--window-size={width + LARGER},{height + LARGER}", (folder / "frame.html").as_uri()],
                          capture_output=True, text=True, timeout=300, check=False)
    picture = cv2.imread(str(shown)) if shown.exists() else None
    if picture is None:
        raise MediaError(f"Chromium made no picture: {' '.join(done.stderr.split())[-200:]}")
    rounded = (np.rint(picture[:height, :width] / STEP) * STEP).astype(np.uint8)
    return cv2.imencode(".png", rounded, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/screenshots", description=(__doc__ or "").partition("\n")[0],
                                     epilog="example: tools/screenshots report.html docs/")
    parser.add_argument("report", type=Path, metavar="REPORT.html|DUMP", help="what `vmq inspect --html` wrote, or a "
                        "dump, of which the report is made first, with --blame")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="FOLDER",
                        help="where report-1280.png and report-390.png go (default: here)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
