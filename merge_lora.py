"""Merge what train.py learned with its base into one standalone model.

    python merge_lora.py --adapter output/train --output_dir output/merged

The base and the LoRA settings come from the run record; --base_model is needed only if the base moved.
"""

from meme_llava.cli import parse_arguments, to_plain
from meme_llava.convert.settings import MergeArguments
from meme_llava.errors import stop_on_user_error
from meme_llava.storage.folders import check_apart, check_output_dir, write_directory
from meme_llava.storage.run_record import LANGUAGE_LORA, write_run_record
from meme_llava.terminal import print_table


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(MergeArguments, argv, description=__doc__)
    # Torch takes seconds to load; a wrong flag is answered before.
    import torch

    from meme_llava.convert import export_clip, export_gguf, export_vllm_lora
    from meme_llava.convert.merge import TrainedWeights, count_merged_bytes, write_merged
    from meme_llava.convert.merge_check import verify_merged
    from meme_llava.storage.fingerprint import find_base, fingerprint_folder
    from meme_llava.storage.tensor_writer import check_free_space

    check_output_dir(arguments.output_dir, arguments.overwrite)
    base_folder = find_base(arguments.adapter, arguments.base_model)
    check_apart(arguments.output_dir, {"adapter": arguments.adapter, "base model": base_folder})
    keeps_lora = arguments.export == "vllm_lora"
    export = {"clip": export_clip, "gguf": export_gguf}.get(arguments.export)
    if export:
        export.check_base(base_folder)
    elif keeps_lora and export_clip.is_needed(base_folder):
        export = export_clip
    trained = TrainedWeights.read(arguments.adapter)
    merged = export_vllm_lora.leave_out_language_lora(trained) if keeps_lora else trained
    dtype = getattr(torch, arguments.dtype)
    with write_directory(arguments.output_dir, arguments.overwrite) as folder:
        # With what comes after the merged model: that takes long, and would be for nothing.
        needed = count_merged_bytes(base_folder, dtype)
        needed += export_gguf.count_bytes(base_folder, dtype) if arguments.export == "gguf" else 0
        needed += export_vllm_lora.count_adapter_bytes(trained) if keeps_lora else 0
        check_free_space(folder, needed, arguments.output_dir)
        summary = write_merged(base_folder, merged, folder, dtype, arguments.max_shard_size)
        if export:
            export.write(folder)
        if keeps_lora:
            export_vllm_lora.write_adapter(folder, trained)
        checks = []
        if arguments.verify:
            checks += verify_merged(base_folder, trained, folder)
            checks += export.verify(base_folder, folder) if export else []
            checks += export_vllm_lora.verify_adapter(folder, trained) if keeps_lora else []
        fingerprint = fingerprint_folder(folder)
        facts = {"summary": summary, "checks": dict(checks), "training": trained.run_record}
        write_run_record(folder, "merge", settings=to_plain(arguments), fingerprint=fingerprint, **facts)

    rows = {**summary, "fingerprint": fingerprint}
    print_table("Merged", ("", "value"), [(name, str(value)) for name, value in rows.items()])
    if checks:
        print_table("Compared with base + adapter", ("check", "finding"), checks)
    else:
        print("not compared with base + adapter (--no_verify)")
    if trained.learned_on_four_bits:
        print("it learned on a base in four bits (--load_in_4bit) and was merged onto the base as it is stored")
    if keeps_lora:
        adapter = arguments.output_dir / LANGUAGE_LORA
        print(f"for vllm serve --enable-lora: model {arguments.output_dir}, adapter {adapter}")
    else:
        print(f"standalone model: {arguments.output_dir}")


if __name__ == "__main__":
    main()
