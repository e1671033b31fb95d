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

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.cli import parse_arguments  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.prepare.annotation_sources import (  # noqa: E402
    FileNameSettings,
    LlavaSettings,
    prepare_chinese_bqb,
    prepare_file_names,
    prepare_llava,
)
from meme_llava.prepare.caption_sources import (  # noqa: E402
    CaptionsSettings,
    EmoVisualSettings,
    TableSettings,
    prepare_captions,
    prepare_emo_visual,
    prepare_table,
)
from meme_llava.prepare.mixing import MixSettings, prepare_mix  # noqa: E402
from meme_llava.prepare.parquet_source import ParquetSettings, prepare_parquet  # noqa: E402
from meme_llava.prepare.splitting import SplitSettings, prepare_split  # noqa: E402

COMMANDS = {
    "captions": (CaptionsSettings, prepare_captions),
    "emo_visual": (EmoVisualSettings, prepare_emo_visual),
    "chinese_bqb": (FileNameSettings, prepare_chinese_bqb),
    "file_names": (FileNameSettings, prepare_file_names),
    "table": (TableSettings, prepare_table),
    "parquet": (ParquetSettings, prepare_parquet),
    "llava": (LlavaSettings, prepare_llava),
    "mix": (MixSettings, prepare_mix),
    "split": (SplitSettings, prepare_split),
}


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Prepare one source."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    settings_class, prepare = _find_command(words)
    prepare(parse_arguments(settings_class, words[1:], description=prepare.__doc__, prog=f"prepare.py {words[0]}"))


def _find_command(words: list[str]) -> tuple:
    if not words or words[0].startswith("-"):
        raise UserError(f"say what to prepare first: {', '.join(COMMANDS)}. --help tells more.")
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown source {words[0]}{guess}; there are {', '.join(COMMANDS)}")
    return COMMANDS[words[0]]


if __name__ == "__main__":
    main()
