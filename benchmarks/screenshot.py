"""Takes the pictures that the documents show.

python -m benchmarks.screenshot                             # the report's first screen, for README
python -m benchmarks.screenshot --address URL --picture docs/mlflow.png    # MLflow, under `make ui`
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

PAGE, PICTURE = Path("reports/report.html"), Path("docs/report.png")
SIZE = "1120x860"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default=PAGE.resolve().as_uri())
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--size", default=SIZE, help="width x height, pixels")
    parser.add_argument(
        "--wait", type=int, default=0, help="seconds for a page that loads its data"
    )
    options = parser.parse_args()
    take(options.address, options.picture, options.size, options.wait)
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")


def take(address: str, picture: Path, size: str, wait: int) -> None:
    """The page at ``address`` as Chromium shows it, in 128 colours."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        raise SystemExit("neither chromium nor google-chrome is installed")
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder, "page.png")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={taken}"]
        options += [f"--user-data-dir={folder}", f"--window-size={size.replace('x', ',')}"]
        options += [f"--virtual-time-budget={1000 * wait}"] if wait else []
        subprocess.run([program, *options, address], check=True, stderr=subprocess.DEVNULL)
        with Image.open(taken) as image:
            small = image.convert("RGB").quantize(128)
            small.save(picture, optimize=True)


if __name__ == "__main__":
    main()
