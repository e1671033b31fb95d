"""Turns what can be downloaded into annotation files, one command per source.

    python data/prepare.py captions      the recipe's caption files + images of emo-visual-data and ChineseBQB
    python data/prepare.py emo_visual    emo-visual-data's own data.json or data.csv
    python data/prepare.py chinese_bqb   ChineseBQB, whose file names carry the text
    python data/prepare.py file_names    a folder of images whose names are the text
    python data/prepare.py table         a CSV or JSONL of captions
    python data/prepare.py parquet       data sets with an image column, from the Hugging Face hub or parquet files
    python data/prepare.py llava         LLaVA JSON as it is
    python data/prepare.py mix           several annotation files, with weights
    python data/prepare.py split         training and validation

Each has its own --help. Beside every annotation file stand a manifest (NAME.manifest.json) and, where something was
left out, the list of that (NAME.left_out.jsonl).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.cli import parse_arguments, suggest  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.prepare import local_sources, mixing, parquet_source, splitting  # noqa: E402
from meme_llava.prepare.writer import ImagesSettings  # noqa: E402
from meme_llava.storage.files import explain_full_disk  # noqa: E402

COMMANDS = {
    "captions": (local_sources.CaptionsSettings, local_sources.prepare_captions),
    "emo_visual": (local_sources.EmoVisualSettings, local_sources.prepare_emo_visual),
    "chinese_bqb": (ImagesSettings, local_sources.prepare_chinese_bqb),
    "file_names": (ImagesSettings, local_sources.prepare_file_names),
    "table": (local_sources.TableSettings, local_sources.prepare_table),
    "parquet": (parquet_source.ParquetSettings, parquet_source.prepare_parquet),
    "llava": (local_sources.LlavaSettings, local_sources.prepare_llava),
    "mix": (mixing.MixSettings, mixing.prepare_mix),
    "split": (splitting.SplitSettings, splitting.prepare_split),
}


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Prepare one source."""
    command, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return
    if not command or command.startswith("-"):
        raise UserError(f"say what to prepare first: {', '.join(COMMANDS)}. --help tells more.")
    if command not in COMMANDS:
        raise UserError(f"unknown source {command}{suggest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
    settings_class, prepare = COMMANDS[command]
    settings = parse_arguments(settings_class, words, description=prepare.__doc__, prog=f"prepare.py {command}")
    with explain_full_disk(settings.output, "Free some, or choose another place."):
        prepare(settings)


if __name__ == "__main__":
    main()
