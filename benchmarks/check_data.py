"""Time and memory of data/check.py on many images, and of decoding alone beside it.

python benchmarks/check_data.py --work_dir /tmp/check --images data/images --count 10000

Every image is a copy of a real one with some bytes of its own behind the end of its data, so that no two files have
the same contents.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from full_size_runs import Bench  # noqa: E402

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402

DECODE_ALONE = (
    "import sys; from pathlib import Path; from PIL import Image\n"
    "for path in sorted(Path(sys.argv[1]).iterdir()): Image.open(path).convert('RGB')"
)
MAX_COUNT = 100_000
TAIL_BYTES = 16


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    work_dir = arguments.work_dir
    if work_dir.exists() and any(work_dir.iterdir()):
        raise UserError(f"{work_dir}: is not empty; give --work_dir another")
    images = work_dir / "data" / "images"
    images.mkdir(parents=True)
    annotations = make_data(arguments.images, images, arguments.count)
    bench = Bench(work_dir)
    flags = ["--annotations", annotations, "--image_folder", images.parent, "--output_dir", work_dir / "check"]
    try:
        bench.run("decode_alone", [sys.executable, "-c", DECODE_ALONE, images])
        bench.run_script("check", ROOT / "data" / "check.py", *flags)
        bench.run_script("check_without_page", ROOT / "data" / "check.py", *flags, "--report_records", "0")
        for step in ("check", "check_without_page"):
            print(f"{step}: {bench.compare(step, 'decode_alone', with_sync=False):.2f} x decoding in one process")
    finally:
        shutil.rmtree(images.parent)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--images", type=Path, default=ROOT / "data" / "images", help="folder of real images")
    parser.add_argument("--count", type=int, default=10_000, help="images to check")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.count <= MAX_COUNT:
        parser.error(f"--count is {arguments.count}, expected 1 to {MAX_COUNT}")
    return arguments


def make_data(originals_folder: Path, images: Path, count: int) -> Path:
    """Fill `images` with copies and write one record about each."""
    originals = sorted(path for path in originals_folder.iterdir() if path.is_file())
    records = []
    for number in range(count):
        original = originals[number % len(originals)]
        name = f"{number:06d}{original.suffix}"
        (images / name).write_bytes(original.read_bytes() + number.to_bytes(TAIL_BYTES, "big"))
        turns = [
            {"from": "human", "value": "<image>\n这张表情包写了什么，是什么意思？"},
            {"from": "gpt", "value": f"第{number}张表情包，原图是{original.stem}，大家都觉得它很好笑。"},
        ]
        records.append({"id": f"r{number}", "image": f"images/{name}", "conversations": turns})
    annotations = images.parent / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return annotations


if __name__ == "__main__":
    main()
