"""python -m pymerge.integrations.fusion_bench_config: write the configs anew, from the methods' parameters."""

from __future__ import annotations

from pymerge.integrations.fusion_bench_config.generate import FOLDER, configs


def main() -> None:
    """Write a config for each method, and remove others."""
    wanted = configs()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.glob("*.yaml"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    print(f"{len(wanted)} configs in {FOLDER}")


if __name__ == "__main__":
    main()
