"""Assemble a language model, a fresh multi_modal_projector and a vision tower into one LLaVA directory.

    python build_base_model.py --language_model Qwen/Qwen2-7B-Instruct \
        --vision_model OFA-Sys/chinese-clip-vit-large-patch14-336px --output_dir output/base
"""

from meme_llava.cli import parse_arguments, to_plain
from meme_llava.convert.settings import BuildArguments
from meme_llava.errors import stop_on_user_error
from meme_llava.storage.folders import check_apart, check_output_dir, resolve_model_folder, write_directory
from meme_llava.storage.run_record import write_run_record
from meme_llava.terminal import print_table


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(BuildArguments, argv, description=__doc__)
    # Torch takes seconds to load; a wrong flag is answered before.
    import torch

    from meme_llava.convert.build import open_parts, write_llava
    from meme_llava.convert.build_check import verify_assembled
    from meme_llava.model.packing import describe_rows
    from meme_llava.storage.fingerprint import fingerprint_folder

    check_output_dir(arguments.output_dir, arguments.overwrite)
    language_folder = resolve_model_folder(arguments.language_model)
    vision_folder = resolve_model_folder(arguments.vision_model)

    check_apart(arguments.output_dir, {"language model": language_folder, "vision tower": vision_folder})
    dtype = None if arguments.dtype == "source" else getattr(torch, arguments.dtype)

    parts = open_parts(language_folder, vision_folder, arguments.image_policy)
    with write_directory(arguments.output_dir, arguments.overwrite) as folder:
        write_llava(parts, folder, arguments.seed, dtype, arguments.max_shard_size)
        checks = verify_assembled(parts, folder, dtype) if arguments.verify else []
        settings, fingerprint = to_plain(arguments), fingerprint_folder(folder)
        write_run_record(folder, "build", settings=settings, fingerprint=fingerprint, checks=dict(checks))

    if checks:
        print_table("Proved on the written directory", ("check", "finding"), checks)
    else:
        print("not compared with its sources (--no_verify)")
    if rows := describe_rows(parts.config.text_config):
        print(rows)
    print(f"base model: {arguments.output_dir}")


if __name__ == "__main__":
    main()
