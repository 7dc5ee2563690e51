"""The page of a report: what it says, and what it does in a real browser."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import BROWSER, DRIVER, chromium
from models import SmallNet
from torch import Tensor, nn
from torchvision import models

from sparsify import GMP, NM, RigL, SRigL, cli, flop_report, sparsify, speed_report
from sparsify.costs.page import _changes
from sparsify.costs.thumbnails import thumbnail

X = (1, 3, 8, 8)
needs_browser = pytest.mark.skipif(not BROWSER or not DRIVER, reason="there is no Chromium here")


def content_of(path: Path) -> dict[str, Any]:
    """Return what a page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def trained(method: Any = None, steps: int = 7) -> nn.Module:
    torch.manual_seed(0)
    method = method or RigL(interval=3)
    model = sparsify(SmallNet(), None if method.layout.fixed else 0.3, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.updater.attach(optimizer, total_steps=20)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, *X[1:])).square().mean().backward()
        optimizer.step()
    return model


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    model = trained()
    report = flop_report(model, X)
    uniform = flop_report(sparsify(SmallNet(), 0.3, "uniform"), X)
    report.to_html(str(tmp_path / "r.html"), others={"uniform": uniform, "erk": report})
    content = content_of(tmp_path / "r.html")
    assert list(content["variants"]) == ["erk", "uniform"]
    for name, r in (("erk", report), ("uniform", uniform)):
        shown = content["variants"][name]
        assert [(x["name"], x["kept"], x["sparse_macs"]) for x in shown["layers"]] == [
            (x.name, x.nonzeros, x.sparse_macs) for x in r.layers
        ]
        assert shown["totals"]["inference_ratio"] == r.inference_ratio
    assert content["masks"].keys() == model.updater.masks.keys()
    used = {w for node in content["nodes"] for w in node["weights"]}
    assert used == set(model.updater.masks)
    assert "coverage:" in " ".join(content["notes"])
    assert (tmp_path / "r.html").stat().st_size < 1_000_000


def test_the_run_so_far_is_what_its_steps_have_cost(tmp_path: Path) -> None:
    """By hand: steps 3 and 6 had dense gradients of weights, a third of a step, and the others sparse ones."""
    model = trained(RigL(interval=3), steps=7)
    report = flop_report(model, X)
    report.to_html(str(tmp_path / "r.html"))
    history, ratio = content_of(tmp_path / "r.html")["history"], report.inference_ratio
    assert history["steps"] == [0, 3, 6, 7]
    dense = [len([at for at in (3, 6) if at <= step]) for step in (3, 6, 7)]
    expected = [ratio + (1 - ratio) / 3 * count / step for step, count in zip((3, 6, 7), dense, strict=True)]
    assert history["training_ratio"] == [None, *map(pytest.approx, expected)]


CHANGES = {
    "rigl": (RigL(interval=3), True),
    "pruning": (GMP(3), True),
    "2:4": (NM(interval=3), True),
    "srigl": (SRigL(interval=3), False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_is_shown_by_what_it_did(case: str, tmp_path: Path) -> None:
    method, said = CHANGES[case]
    model = trained(method)
    flop_report(model, X).to_html(str(tmp_path / "r.html"))
    run = content_of(tmp_path / "r.html")["history"]
    assert run["steps"] == [0, 3, 6, 7]
    for line in run["densities"]:
        assert line["values"][-1] == model.updater.densities[line["label"]]
    assert bool(run["changes"]) == said
    if said:
        before, after = (sum(entry.nonzeros.values()) for entry in model.updater.history[:2])
        assert after - before == run["changes"]["grown"][0] - run["changes"]["dropped"][0]
        assert run["changes"]["dropped"][0] > 0
    assert content_of_untrained(tmp_path)["history"] is None


def content_of_untrained(folder: Path) -> dict[str, Any]:
    flop_report(SmallNet(), X).to_html(str(folder / "dense.html"))
    return content_of(folder / "dense.html")


def test_changes_are_those_of_the_masks() -> None:
    """As many are dropped and grown as the plan says; some of those that are dropped come back at once."""
    model = trained(steps=2)
    before = {name: mask.clone() for name, mask in model.updater.masks.items()}
    optimizer = model.updater._attached[0].optimizer
    optimizer.zero_grad()
    model(torch.randn(2, *X[1:])).square().mean().backward()
    optimizer.step()
    gone = sum(int((before[n] & ~mask).sum()) for n, mask in model.updater.masks.items())
    changes = _changes(model)
    assert changes is not None
    assert changes["steps"] == [3]
    amount = model.updater.method.updates.amount(3, 20)
    counts = [n for name, n in model.updater.nonzeros.items() if n < before[name].numel()]
    assert gone <= changes["dropped"][0] == changes["grown"][0] == sum(int(amount * n) for n in counts)


def test_speed_is_on_the_page(tmp_path: Path) -> None:
    model = sparsify(SmallNet(), 0.3, method="static").eval()
    speed = speed_report(model, X, repeats=1, backend="native")
    flop_report(model, X).to_html(str(tmp_path / "r.html"), speed=speed)
    content = content_of(tmp_path / "r.html")
    assert content["speed"]["speedup"] == speed.speedup
    assert sum(x["measured"] > 0 for x in content["variants"]["static"]["layers"]) >= 1


def test_thumbnails() -> None:
    import base64

    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = True
    small = thumbnail(mask, 0)
    assert small is not None
    assert list(base64.b64decode(small["values"])) == [0, 0, 0, 0, 0, 255]
    flipped = thumbnail(mask, 1)
    assert flipped is not None
    assert (flipped["width"], flipped["height"]) == (2, 3)
    large = torch.zeros(64, 64, dtype=torch.bool)
    large[:2, :2] = True
    large[0, 2] = True
    found = thumbnail(large, 0)
    assert found is not None
    values = base64.b64decode(found["values"])
    assert (values[0], values[1], values[2], found["width"]) == (255, 64, 0, 32)
    assert "strongest 100% kept" in found["caption"]
    assert thumbnail(torch.empty(2, 2, device="meta"), 0) is None


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a folder that is not there": (lambda f: flop_report(trained(), X).to_html(str(f / "no" / "r.html")), OSError, "no"),
    "trained since": (lambda f: _trained_since(f), ValueError, "call flop_report"),
    "another model": (lambda f: _of_another(f), ValueError, "'other' is of other layers"),
    "a copy": (lambda f: _copied(f), ValueError, "lost its model"),
}


def _trained_since(folder: Path) -> None:
    model = trained()
    report = flop_report(model, X)
    model.updater.masks["conv1.weight"][0, 0, 0] ^= True
    report.to_html(str(folder / "r.html"))


def _of_another(folder: Path) -> None:
    report = flop_report(trained(), X)
    report.to_html(str(folder / "r.html"), others={"other": flop_report(nn.Sequential(nn.Linear(8, 2)), (1, 8))})


def _copied(folder: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(flop_report(trained(), X))).to_html(str(folder / "r.html"))


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path) -> None:
    run, error, text = BAD[case]
    with pytest.raises(error, match=text):
        run(tmp_path)
    assert not (tmp_path / "r.html").exists()


def test_the_command_line_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "r.html"
    shape = ["--input", "1x3x64x64", "--no-verify"]
    assert cli.main(["squeezenet1_1", "--density", "0.1", *shape, "--html", str(page)]) == 0
    content = content_of(page)
    assert list(content["variants"]) == ["erk", "uniform", "er"]
    assert len(content["masks"]) == 26
    assert cli.main(["squeezenet1_1", "--density", "0.1", "--html", str(tmp_path / "no" / "r.html")]) == 1
    capsys.readouterr()


# In a browser.


class Hostile(nn.Module):
    """A model whose names are markup."""

    def __init__(self) -> None:
        super().__init__()
        names = ("<script>window[`hurt`]=1</script>", "</script><img src=x onerror=window[`hurt`]=1>", "{{data}}")
        self.layers = nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in names))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


Hostile.__name__ = "<img src=x onerror=window[`hurt`]=1>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def show(browser: Any, path: Path, width: int = 1200, height: int = 800, dark: bool = False) -> Callable[[str], Any]:
    """Open a page in a window of a size and a scheme; return what evaluates an expression there."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(path.as_uri())
    return lambda expression: browser.execute_script(f"return {expression}")


def assert_quiet(browser: Any) -> None:
    """Nothing was logged, and nothing but the file was asked for."""
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "resnet.html"
    assert cli.main(["resnet18", "--density", "0.1", "--no-verify", "--html", str(path)]) == 0
    return path


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1200, 800), (390, 800)])
def test_pages_fit(browser: Any, resnet: Path, size: tuple[int, int], dark: bool) -> None:
    read = show(browser, resnet, *size, dark=dark)
    assert read("document.documentElement.scrollWidth") <= size[0]
    back = read("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) == dark
    assert read("view.cy.nodes().length") > 5
    assert read("document.getElementById('graph').clientWidth") > 0.4 * min(size[0], 600)
    assert_quiet(browser)


@needs_browser
def test_tables_sort_and_filter(browser: Any, resnet: Path) -> None:
    read = show(browser, resnet)
    names = "[...document.querySelectorAll('tbody tr')].map(r => r.dataset.layer)"
    first = read(names)
    assert first[0] == "conv1.weight"
    assert len(first) == 21
    for column, key in ((4, "density"), (3, "kept"), (5, "sparse_macs")):
        head = f"document.querySelectorAll('th button')[{column}]"
        for order in ("descending", "ascending"):
            read(f"{head}.click()")
            values = read(f"{names}.map(n => view.layers[n].{key})")
            assert values == sorted(values, reverse=order == "descending")
            assert read(f"document.querySelectorAll('th')[{column}].getAttribute('aria-sort')") == order
        read(f"{head}.click()")
        assert read(names) == first
    browser.find_element("id", "search").send_keys("layer2 conv2")
    assert read(names) == ["layer2.0.conv2.weight", "layer2.1.conv2.weight"]
    assert read("document.getElementById('shown').textContent") == "2 of 21"
    assert_quiet(browser)


@needs_browser
def test_rows_and_nodes_show_each_other(browser: Any, resnet: Path) -> None:
    read = show(browser, resnet)
    read("view.foldAll()")
    folded = read("view.cy.nodes().length")
    read("document.querySelector('tr[data-layer=\"layer3.1.conv2.weight\"]').click()")
    assert read("view.cy.nodes('.chosen').map(n => n.data('label'))")[0].startswith("conv2")
    assert read("view.cy.nodes().length") > folded
    assert "layer3.1.conv2.weight" in read("document.getElementById('details').textContent")
    assert read("document.querySelectorAll('#details canvas').length") == 1
    read("void view.cy.nodes().filter(n => n.data('label').startsWith('fc')).emit('tap')")
    assert read("[...document.querySelectorAll('tr[aria-selected=true]')].map(r => r.dataset.layer)") == ["fc.weight"]
    open_blocks = read("view.cy.nodes('.open').length")
    read("void view.cy.nodes('.open').first().emit('tap')")
    assert read("view.cy.nodes('.open').length") < open_blocks
    read("document.getElementById('fold').click()")
    assert read("view.cy.nodes().length") == folded
    zoom = read("view.cy.zoom()")
    read("document.getElementById('zoom-in').click()")
    assert read("view.cy.zoom()") > zoom
    assert_quiet(browser)


@needs_browser
def test_the_switch_shows_other_distributions(browser: Any, resnet: Path) -> None:
    read = show(browser, resnet)
    shown = "document.querySelectorAll('.total')[1].textContent"
    content = content_of(resnet)["variants"]
    for name in ("uniform", "er", "erk"):
        read(f"document.querySelector('[data-variant={name}]').click()")
        assert f"{100 * content[name]['totals']['inference_ratio']:.1f}%" in read(shown)
        assert read("view.layers['conv1.weight'].kept") == content[name]["layers"][0]["kept"]
    assert_quiet(browser)


@needs_browser
def test_a_run_has_charts(browser: Any, tmp_path: Path) -> None:
    flop_report(trained(), X).to_html(str(tmp_path / "r.html"))
    read = show(browser, tmp_path / "r.html")
    assert read("document.querySelectorAll('#charts canvas').length") == 3
    assert_quiet(browser)


@needs_browser
def test_hostile_names_stay_text(browser: Any, tmp_path: Path) -> None:
    model = sparsify(Hostile(), 0.5)
    flop_report(model, (1, 8)).to_html(str(tmp_path / "r.html"))
    read = show(browser, tmp_path / "r.html")
    assert read("window.hurt === undefined && document.querySelectorAll('img').length === 0")
    assert "<img" in read("document.getElementById('title').textContent")
    assert "<script>window[`hurt`]=1</script>" in read("document.querySelector('tbody').textContent")
    for row in range(3):
        read(f"document.querySelectorAll('tbody tr')[{row}].click()")
    assert read("window.hurt === undefined")
    assert_quiet(browser)


class Wide(nn.Module):
    """Hundreds of layers in one module."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(400):
            setattr(self, f"layer{i}", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@needs_browser
@pytest.mark.parametrize("kind", ["vit_l_16", pytest.param("faster r-cnn", marks=pytest.mark.sweep), "wide", "python"])
def test_large_models_are_folded(browser: Any, kind: str, tmp_path: Path) -> None:
    inputs: Any = (1, 3, 224, 224)
    if kind == "wide":
        model, inputs = Wide(), (1, 4)
    elif kind == "python":
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=64))
        inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    elif kind == "vit_l_16":
        with torch.device("meta"):
            model = models.vit_l_16()
    else:
        model = models.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
        inputs = [torch.rand(3, 64, 64)]
    sparse = sparsify(model, 0.1)
    flop_report(sparse, inputs).to_html(str(tmp_path / "r.html"))
    read = show(browser, tmp_path / "r.html")
    assert 1 <= read("view.cy.nodes().length") < 150
    weights = sorted(sparse.updater.nonzeros)
    for name in (weights[0], weights[len(weights) // 2], weights[-1]):
        read(f"choose([{json.dumps(name)}], true)")
        assert read("view.cy.nodes('.chosen').length") >= 1
    assert_quiet(browser)
