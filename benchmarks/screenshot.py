"""Takes the picture of the report that README shows: the first screen of reports/report.html.

python -m benchmarks.screenshot
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

PAGE, PICTURE = Path("reports/report.html"), Path("docs/report.png")
SIZE = (1120, 860)


def main() -> None:
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        raise SystemExit("neither chromium nor google-chrome is installed")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder, "page.png")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={taken}"]
        options += [f"--user-data-dir={folder}", "--window-size={},{}".format(*SIZE)]
        subprocess.run([program, *options, PAGE.resolve().as_uri()], check=True)
        with Image.open(taken) as picture:
            small = picture.convert("RGB").quantize(128)
            small.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
