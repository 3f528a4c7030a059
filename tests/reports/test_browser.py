"""The page in a real browser: it draws, sorts, filters and tells, and complains of nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from linear_vit.reports.__main__ import main
from tests.reports import saved
from tests.reports.browser import WHY_NONE, Browser, executable

pytestmark = pytest.mark.skipif(executable() is None, reason=WHY_NONE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    run = saved.run()
    bfloat16 = [
        saved.case("linear_attention", backend, "forward", 2**i, "bfloat16")
        for backend in ("torch", "compiled")
        for i in range(6, 13)
    ]
    run["benchmarks"] += bfloat16
    saved.save_all(folder)
    for case in run["benchmarks"][:14]:  # linear attention with reference, forward and both
        case["extra_info"]["profile"] = saved.profile(case, ncu=case["extra_info"]["N"] == 64)
    (folder / "profiles").mkdir()
    trace = run["benchmarks"][0]["extra_info"]["profile"]["trace"]
    (folder / trace).write_bytes(b"")
    saved.save(folder / "run.json", run)
    out = folder / "index.html"
    assert main(["page", "--results", str(folder), "--out", str(out)]) == 0
    return out


def visible(browser: Browser, selector: str) -> int:
    return browser.run(
        f"[...document.querySelectorAll({selector!r})].filter(e => e.checkVisibility()).length"
    )


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"{{ const s = document.querySelector('select[name={name}]'); s.value = {value!r};"
        " s.dispatchEvent(new Event('change', {bubbles: true})); }"
    )


# Of the first table that has this heading: the column as text, top to bottom.
COLUMN = """((title, name) => {
  const table = [...document.querySelectorAll('.table')].find(t => t.textContent.includes(title));
  const heads = [...table.querySelectorAll('th')];
  const at = heads.findIndex(h => h.textContent === name);
  return [...table.querySelectorAll('tbody tr')].map(row => row.cells[at].textContent);
})"""
CLICK = """((title, name) => {
  const table = [...document.querySelectorAll('.table')].find(t => t.textContent.includes(title));
  [...table.querySelectorAll('th button')].find(b => b.textContent === name).click();
})"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_draws_every_figure_without_complaint(
    browser: Browser, html: Path, width: int, dark: bool
) -> None:
    browser.open(html, width=width, dark=dark)
    figures = browser.run("document.querySelectorAll('figure').length")
    assert figures > 15
    assert visible(browser, "figure .plot > svg") == figures
    # Everything fits the width; what is wider scrolls within itself.
    assert browser.run("document.documentElement.scrollWidth") <= width
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 24, 27)" if dark else "rgb(255, 255, 255)")
    # Axes take the theme's ink.
    ink = browser.run("getComputedStyle(document.querySelector('figure svg')).color")
    assert ink == ("rgb(227, 231, 234)" if dark else "rgb(29, 35, 41)")
    assert browser.complaints == []


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_a_table_fits_or_says_that_it_goes_on(browser: Browser, html: Path, width: int) -> None:
    browser.open(html, width=width)
    wider, told = browser.run(
        """(tables => [
          tables.map(t => t.querySelector('.scroll')).map(s => s.scrollWidth > s.clientWidth + 1),
          tables.map(t => t.querySelector('.more').checkVisibility())
        ])([...document.querySelectorAll('.table')].filter(t => t.checkVisibility()))"""
    )
    assert wider == told
    if width == 390:
        assert any(wider)
    else:  # those of results and proofs were wider than the page
        assert not any(wider)


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_and_bars_stay_inside_their_plot(browser: Browser, html: Path, width: int) -> None:
    browser.open(html, width=width)
    outside = browser.run(
        """[...document.querySelectorAll('figure:not(.heat) .plot > svg')].flatMap(svg => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('text, [aria-label=link] path')].filter(mark => {
            const at = mark.getBoundingClientRect();
            return at.width && (at.left < box.left - 1 || at.right > box.right + 1
              || at.top < box.top - 1 || at.bottom > box.bottom + 1);
          }).map(mark => mark.textContent || mark.parentElement.getAttribute('aria-label'));
        })"""
    )
    assert outside == []


def test_what_was_disturbed_is_drawn_otherwise(browser: Browser, tmp_path: Path) -> None:
    run = saved.run()
    shaken = [c for c in run["benchmarks"] if c["extra_info"].get("N") == 4096]
    for case in shaken:
        case["extra_info"]["disturbed"] = "threads of ours waited"
    saved.save(tmp_path / "run.json", run)
    out = tmp_path / "index.html"
    main(["page", "--results", str(tmp_path), "--out", str(out)])
    browser.open(out)
    dashed = "#complexity figure:first-of-type [aria-label=dot][stroke-dasharray] path"
    # Linear and softmax attention by three backends.
    assert visible(browser, dashed) == 6
    assert visible(browser, "#speed td.disturbed") == len(shaken)
    assert browser.complaints == []


def test_opens_with_the_answer_and_ends_with_where_it_is_from(browser: Browser, html: Path) -> None:
    browser.open(html)
    order = browser.run("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert order[:2] == ["complexity", "results"]
    assert order[-1] == "where"
    answer, *_ = browser.run("[...document.querySelectorAll('.answer')].map(p => p.textContent)")
    assert "the fastest is" in answer
    first = browser.run("document.querySelector('.answer').getBoundingClientRect().top")
    assert first < 300


def test_prints_all_but_what_needs_a_screen(browser: Browser, html: Path) -> None:
    browser.open(html, width=794, dark=True, print_=True)
    assert visible(browser, "nav, .filters, .save") == 0
    assert visible(browser, "figure .plot > svg") > 15
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(255, 255, 255)"


def test_sorts_by_value_and_back(browser: Browser, html: Path) -> None:
    browser.open(html)
    heading = "Linear attention, forward; float32"
    # 64 to 4,096 tokens: as text 1,024 would come first.
    lengths = [f"{2**i:,}" for i in range(6, 13)]
    assert browser.run(f"{COLUMN}({heading!r}, 'N')") == lengths
    for expected in (lengths, lengths[::-1], lengths):
        browser.run(f"{CLICK}({heading!r}, 'N')")
        assert browser.run(f"{COLUMN}({heading!r}, 'N')") == expected
    # µs before ms, whatever the digits.
    browser.run(f"{CLICK}({heading!r}, 'torch')")
    times = browser.run(f"{COLUMN}({heading!r}, 'torch')")
    assert times[0] == "51.2 µs"
    assert times[-1] == "3.28 ms"
    # What has no value comes last in either order.
    assert browser.run(f"{COLUMN}('Fitted exponents', 'exponent p')")[0].startswith("1.00")
    browser.run(f"{CLICK}('of 3 that can run here', 'cuda')")
    assert browser.complaints == []


def test_filters_hide_tables_columns_rows_and_curves(browser: Browser, html: Path) -> None:
    browser.open(html)
    figures = visible(browser, "figure")
    curve = "figure.curves .legend button"
    curves, tables = visible(browser, curve), visible(browser, ".table")
    rows = "#complexity tbody tr"
    # Crossovers, fits of two dtypes, one of the C++ alone, and those of a GPU's run.
    assert visible(browser, rows) == 6 + 18 + 2 + 1 + 7

    choose(browser, "backend", "compiled")
    assert visible(browser, "th[data-backend=torch], td[data-backend=torch]") == 0
    assert visible(browser, "th[data-backend=compiled]") > 0
    assert visible(browser, curve) < curves
    assert browser.run(
        "[...document.querySelectorAll('figure.curves:not([hidden]) .legend button')]"
        ".every(b => b.textContent.startsWith('compiled'))"
    )
    assert visible(browser, rows) == 2 + 6 + 1

    choose(browser, "dtype", "bfloat16")
    assert visible(browser, rows) == 1
    choose(browser, "operation", "ripple_pool")
    assert visible(browser, rows) == 0
    assert visible(browser, "figure.curves") == 0
    # What belongs to no operation, backend or dtype stays.
    assert visible(browser, "figure.intervals") == 1
    assert visible(browser, "#where table") == 1

    browser.run("document.querySelector('.filters button').click()")
    assert [visible(browser, "figure"), visible(browser, ".table")] == [figures, tables]
    assert visible(browser, curve) == curves
    assert browser.complaints == []


def test_gpu_results_and_profiles_filter_sort_and_link(browser: Browser, html: Path) -> None:
    browser.open(html)
    heading = "Linear attention, forward; bfloat16, gpu sweep, Test GPU"
    lengths = ["64", "1,024", "4,096", "16,384"]
    assert browser.run(f"{COLUMN}({heading!r}, 'N')") == lengths
    browser.run(f"{CLICK}({heading!r}, 'triton (graph)')")
    assert browser.run(f"{COLUMN}({heading!r}, 'N')")[0] == "64"  # the only one that was replayed
    replayed = browser.run(f"{COLUMN}({heading!r}, 'triton (graph)')")
    assert replayed == ["128 ns", "–", "–", "–"]

    # Traces that are there are linked, from where the page is.
    links = "[...document.querySelectorAll('#profiles td a')].map(a => a.getAttribute('href'))"
    (link,) = set(browser.run(links))
    assert (html.parent / link.replace("%2B", "+")).is_file()

    choose(browser, "backend", "sdpa_flash")
    assert visible(browser, "#complexity figure") == 2
    assert visible(browser, "#complexity figure .legend button") == 2
    assert visible(browser, "#profiles tbody tr") == 0
    choose(browser, "backend", "reference")
    assert visible(browser, "#profiles tbody tr") > 0
    assert browser.complaints == []


def test_legend_hides_a_curve(browser: Browser, html: Path) -> None:
    browser.open(html)
    lines = "document.querySelector('figure.curves [aria-label=line]').childElementCount"
    before = browser.run(lines)
    browser.run("document.querySelector('figure.curves .legend button').click()")
    assert browser.run(lines) == before - 1
    pressed = "document.querySelector('figure.curves .legend button').ariaPressed"
    assert browser.run(pressed) == "false"
    browser.run("document.querySelector('figure.curves .legend button').click()")
    assert browser.run(lines) == before


def test_tooltips_give_the_exact_figure(browser: Browser, html: Path) -> None:
    browser.open(html)
    # Scrolling hides a tip, and is told of with the next frame.
    at = """(async element => { element.scrollIntoView({block: 'center'});
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        const box = element.getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2]; })"""
    cell = "[...document.querySelectorAll('td[data-tip]')].find(c => c.textContent === '51.2 µs')"
    browser.move_to(*browser.run(f"{at}({cell})"))
    tip = browser.run("document.getElementById('tip').checkVisibility() && tip.textContent")
    assert "0.0512 ms (quartiles 0.050688 to 0.051712; 9 rounds)" in tip
    assert "ran: aten::bmm, aten::relu" in tip

    mark = "document.querySelector('figure.curves [aria-label=dot] path')"
    browser.move_to(*browser.run(f"{at}({mark})"))
    drawn = "document.querySelector('figure.curves [aria-label=tip]').textContent"
    told = browser.run(drawn)
    assert "reference, linear attention" in told
    assert "0.1024 ms" in told


def test_a_saved_plot_stands_alone(browser: Browser, html: Path) -> None:
    browser.open(html, dark=True)
    text = browser.run("asFile(document.querySelector('figure.curves .plot > svg'))")
    assert text.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert "var(--" not in text
    assert "currentColor" not in text


def test_markup_in_a_file_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    run = saved.run()
    machine = saved.MACHINE | {"cpu": "</script><script>alert(1)</script>"}
    run["kernel_suite"]["machine"] = machine
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        info["implementation"] = "<img src=x onerror=alert(2)>"
    saved.save(tmp_path / "run.json", run)
    out = tmp_path / "index.html"
    main(["page", "--results", str(tmp_path), "--out", str(out)])
    browser.open(out)
    assert visible(browser, "figure .plot > svg") > 10
    assert browser.complaints == []
