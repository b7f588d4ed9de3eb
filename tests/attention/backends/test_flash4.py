"""When flash-attn-4 is there, and the tiles asked of it; its results are compared where there is a GPU."""

from pathlib import Path

import pytest

from windowlm.attention.backends.flash4 import HOPPER, SMALL_TILES, SMALL_WINDOW, _installed, tiles_for


@pytest.mark.parametrize(("package", "there"), [("flash_attn-2.8.3", False), ("flash_attn_4-4.0.0b36", True)])
def test_the_package_is_known_by_its_name_and_not_imported(
    package: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, version = package.rsplit("-", 1)
    described = tmp_path / f"{package}.dist-info"
    module = tmp_path / "flash_attn" / "cute"
    for folder in (described, module):
        folder.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file in (module / "__init__.py", module.parent / "__init__.py"):
        file.write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert _installed() == there


@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 8])
def test_small_windows_take_small_tiles_that_hold_whole_groups(group_size: int) -> None:
    assert tiles_for(SMALL_WINDOW, group_size, HOPPER) == SMALL_TILES
    assert SMALL_TILES[0] % group_size == 0


@pytest.mark.parametrize(
    ("window", "group_size", "generation"),
    [
        (SMALL_WINDOW + 1, 4, HOPPER),
        (None, 4, HOPPER),
        (64, 1, HOPPER),
        (64, 5, HOPPER),
        (64, 4, HOPPER + 1),
    ],
)
def test_elsewhere_the_package_chooses(window: int | None, group_size: int, generation: int) -> None:
    assert tiles_for(window, group_size, generation) is None
