"""The page: complete, self-contained, hostile text contained; opened in a headless browser where there is one."""

import json
import re
import shutil
import subprocess

import pytest

from srl_jax.metrics import HISTOGRAMS_FILE
from srl_jax.page import write_page
from srl_jax.report import ReportError
from tests.report_test import MALFORMED, item, workdir, write_evaluation  # noqa: F401  (workdir is a fixture)

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROME is None, reason="no Chromium is installed")
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"><!-- \u2028'


def embedded(page):
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found.group(1))


def test_the_page_holds_every_number_and_trace(workdir):  # noqa: F811
    write_evaluation(workdir, "teacher", [item(n, 1.0, kl=None, diff="--- a\n+++ b\n+x\n") for n in range(10)])
    write_evaluation(workdir, "step10", [item(n, 0.4) for n in range(10)])
    data = embedded(write_page(workdir))
    assert data["names"] == ["base", "student", "teacher", "step10"] and data["columns"] == data["names"][:3]
    assert set(data["tables"]) == {"all", "python", "javascript"}
    mean, low, high = data["tables"]["all"]["reward"]["base"]
    assert mean == pytest.approx(0.291) and low < mean < high
    assert "teacher" not in data["tables"]["all"]["KL per token"]
    assert len(data["metrics"]) == 20 and len(data["tasks"]) == 10
    assert data["answers"]["base"]["task-04"]["rejection"] == MALFORMED["rejection"]
    assert data["answers"]["teacher"]["task-00"]["diff"].startswith("--- a")


def test_kinds_of_tasks_have_tables_and_empty_measures_no_row(workdir):  # noqa: F811
    for name in ("base", "student"):
        kinds = {"language": "python", "source": "real", "step": None, "rule_seen": True}
        write_evaluation(workdir, name, [item(n, 0.4, **(kinds if n < 3 else {})) for n in range(10)])
    tables = embedded(write_page(workdir))["tables"]
    assert list(tables)[3:] == ["language: python", "code: real", "rule: seen in training", "place: a task of its own"]
    assert tables["code: real"]["reward"]["student"] == [pytest.approx(0.4)] * 3
    assert "match-set F1" not in tables["all"] and "sampled: pass@1" not in tables["all"]


def test_nothing_is_asked_of_the_network(workdir):  # noqa: F811
    page = write_page(workdir).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)


def test_hostile_text_stays_data(workdir):  # noqa: F811
    write_evaluation(workdir, "student", [item(n, completion=HOSTILE, instruction=HOSTILE) for n in range(10)])
    path = write_page(workdir)
    assert embedded(path)["answers"]["student"]["task-00"]["completion"] == HOSTILE
    assert path.read_text(encoding="utf-8").count("<script") == 2


def test_a_directory_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ReportError, match=r"no eval_<name>\.json"):
        write_page(tmp_path)
    assert not list(tmp_path.iterdir())


def test_distributions_over_time_are_thinned_to_what_can_be_seen(workdir):  # noqa: F811
    counted = {"reward/total": {"range": [-0.2, 1.0], "counts": [0, 3, 5]}}
    lines = (json.dumps({"step": step} | counted) + "\n" for step in range(1, 302))
    (workdir / HISTOGRAMS_FILE).write_text("".join(lines))
    shown = embedded(write_page(workdir))["histograms"]
    assert [step["step"] for step in shown] == list(range(1, 302, 3)) and shown[0] == {"step": 1} | counted
    (workdir / HISTOGRAMS_FILE).unlink()
    assert embedded(write_page(workdir))["histograms"] == []


def browse(page, *options):
    """The headless browser's output for a page."""
    browser = [CHROME, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", *options]
    done = subprocess.run([*browser, page.as_uri()], check=True, capture_output=True, timeout=300)
    return done.stdout.decode()


def probed(page, script):
    """A copy of the page that also runs `script` when it is loaded."""
    copy = page.with_name("probed.html")
    run = f"<script>addEventListener('load', () => {{ {script} }});</script></body>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", run), encoding="utf-8")
    return copy


@needs_browser
def test_keys_choose_a_task_unless_one_is_typing(workdir):  # noqa: F811
    press = "const press = (key, where) => where.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
    chosen = "const chosen = () => document.querySelector('[aria-selected=true]').title;"
    script = (
        "const seen = [chosen()]; const list = document.getElementById('tasks');"
        "for (const key of ['j', 'j', 'k', 'ArrowDown']) { press(key, document.body); seen.push(chosen()); }"
        "list.focus(); press('ArrowDown', list); seen.push(chosen());"
        "press('j', document.getElementById('text')); seen.push(chosen());"
        "for (let i = 0; i < 99; i++) press('j', list); seen.push(chosen()); document.title = seen.join(' ');"
    )
    html = browse(probed(write_page(workdir), press + chosen + script), "--dump-dom", "--window-size=1300,900")
    numbers = re.search(r"<title>(.*?)</title>", html).group(1).replace("task-", "").split()
    # j, j and k; an arrow that scrolls the page, one in the list; a letter of a search; beyond the end.
    assert list(map(int, numbers)) == [0, 1, 2, 1, 1, 2, 2, 9]


@needs_browser
def test_on_a_narrow_screen_nothing_stands_beside_it(workdir):  # noqa: F811
    kinds = {"sampled": [{"reward": 0.5, "rejection": None, "success": True, "kl": 0.1}]}
    for name in ("base", "student", "teacher"):
        long = {"completion": "<think>" + "long" * 200 + "</think>", "diff": "+" + "x" * 400}
        write_evaluation(workdir, name, [item(n, 0.7, **kinds, **long) for n in range(10)])
    report = "const { scrollWidth, clientWidth } = document.documentElement;"
    inner = probed(write_page(workdir), report + "parent.postMessage([scrollWidth, clientWidth], '*');")
    # A headless window is at least 500 wide; a frame may be as narrow as a telephone.
    frame = workdir / "frame.html"
    frame.write_text(
        "<script>addEventListener('message', (event) => { document.title = event.data.join(' '); });</script>"
        f'<iframe src="{inner.name}" width="360" height="800" style="border: 0"></iframe>'
    )
    found = re.search(r"<title>(\d+) (\d+)</title>", browse(frame, "--dump-dom"))
    width, shown = map(int, found.groups())
    assert width <= shown <= 360


@needs_browser
@pytest.mark.parametrize("width", [360, 1300])
def test_a_browser_draws_it(workdir, width):  # noqa: F811
    write_evaluation(workdir, "student", [item(n, 0.7, completion=HOSTILE) for n in range(10)])
    (workdir / HISTOGRAMS_FILE).write_text('{"step": 1, "kl": {"range": [0, 1], "counts": [1, 2]}}\n')
    page = write_page(workdir)
    size = f"--window-size={width},2400"
    picture = workdir / "page.png"
    browse(page, size, f"--screenshot={picture}")
    assert picture.stat().st_size > 20_000
    html = browse(page, size, "--dump-dom")
    assert 'aria-label="kl, distribution by step"' in html
    assert "owned</title>" not in html and "<title>Run " in html
    shown = html.split('<ul id="tasks"')[1].split("</ul>")[0]
    assert shown.count('role="option"') == 10 and "task-00" in shown
    assert html.count("<svg") >= 5 and "10 of 10 tasks" in html
    assert "&lt;/script&gt;" in html  # the completion, as text
