"""The page: complete, self-contained, hostile text contained; opened in a headless browser where there is one."""

import json
import re
import shutil
import subprocess

import pytest

from srl_jax.page import write_page
from srl_jax.report import ReportError
from tests.report_test import MALFORMED, item, workdir, write_evaluation  # noqa: F401  (workdir is a fixture)

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
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


@pytest.mark.skipif(CHROME is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [360, 1300])
def test_a_browser_draws_it(workdir, width):  # noqa: F811
    write_evaluation(workdir, "student", [item(n, 0.7, completion=HOSTILE) for n in range(10)])
    page = write_page(workdir)
    size = f"--window-size={width},2400"
    browser = [CHROME, "--headless=new", "--no-sandbox", "--disable-gpu", size, "--virtual-time-budget=2000"]
    picture = workdir / "page.png"
    options = {"check": True, "capture_output": True, "timeout": 300}
    subprocess.run([*browser, f"--screenshot={picture}", page.as_uri()], **options)
    assert picture.stat().st_size > 20_000
    html = subprocess.run([*browser, "--dump-dom", page.as_uri()], **options).stdout.decode()
    assert "owned</title>" not in html and "<title>Run " in html
    shown = html.split('<ul id="tasks"')[1].split("</ul>")[0]
    assert shown.count('role="option"') == 10 and "task-00" in shown
    assert html.count("<svg") >= 5 and "10 of 10 tasks" in html
    assert "&lt;/script&gt;" in html  # the completion, as text
