"""report.html in a real browser, offline: drawn, in the scheme that is asked for, and nothing sticks out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from aligntune.compare import outputs
from aligntune.compare.report import Report, build
from aligntune.compare.settings import Settings, read_arm
from tests.compare import made_up

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")]
SCHEMES = {"dark": (0, (0x12, 0x16, 0x1C)), "light": (1, (0xFF, 0xFF, 0xFF))}
LINES = {"dark": ((0x6D, 0xB0, 0xF5), (0xF7, 0x9A, 0x5F)), "light": ((0x1F, 0x66, 0xB0), (0xC0, 0x4F, 0x12))}


@pytest.mark.parametrize("width", [1100, 520])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_in_a_browser(scheme: str, width: int, tmp_path: Path) -> None:
    results = made_up.results(tmp_path, b={"noise": 1e-3})
    settings = Settings("sft-builtin", {}, {}, read_arm("trl"), read_arm("fast"))
    outputs.write(Report(build(settings, results, command=["aligntune", "compare"]), tmp_path))
    number, page = SCHEMES[scheme]
    picture = tmp_path / "page.png"
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={number}",
         f"--window-size={width},3200", f"--screenshot={picture}", (tmp_path / "report.html").as_uri()],
        check=True, capture_output=True, timeout=120)
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (3200, width)
    assert tuple(pixels[2, 2]) == page

    def share(colour: tuple[int, int, int]) -> float:
        return float((abs(pixels - colour).max(-1) <= 2).mean())

    assert 0.5 < share(page) < 0.99  # text, tables and charts are there
    for line in LINES[scheme]:
        assert share(line) > 2e-5, f"no line in the colour of an arm: {line}"
    edge = pixels[:, -8:]
    assert (abs(edge - page).max(-1) <= 2).all(), "something sticks out of the page"
