"""report.html: complete, escaped, without network requests, and explicit about missing results."""

import json
import os
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from training.errors import ConfigError
from training.html_report import write_html_report
from training.run_folder import RunFolder

EVIL = "<script>document.title='broken'</script><img src=http://127.0.0.1:{port}/x.png> & \"quoted\""


@pytest.fixture
def run_folder(finished_run):
    """A finished run whose most confident mistake has markup in its text."""
    folder = RunFolder(finished_run)
    report = json.loads(folder.report.read_text())
    mistake = {"text": EVIL.format(port=1), "true": "a<b>", "predicted": "c", "probability": 0.99}
    folder.report.write_text(json.dumps(report | {"mistakes": [mistake]}))
    return folder


def test_a_report_shows_scores_curves_classes_and_settings(run_folder):
    write_html_report(run_folder)
    page = run_folder.html.read_text()
    report = json.loads(run_folder.report.read_text())
    assert f"{100 * report['test']['accuracy']:.2f} %" in page
    assert page.count("<svg") == 6 and "Validation scores" in page and "Test split: texts by class" in page
    for name in report["label_names"]:
        assert f"<td>{name}</td>" in page
    assert "learning_rate = 0.02" in page and f"{report['trainable_parameters']:,}" in page


def test_what_data_contains_is_shown_as_text(run_folder):
    write_html_report(run_folder)
    page = run_folder.html.read_text()
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "&lt;script&gt;document.title" in page and "a&lt;b&gt;" in page


def test_a_report_distinguishes_no_mistakes_from_no_test_scores(run_folder):
    report = json.loads(run_folder.report.read_text())

    def page(**changes):
        run_folder.report.write_text(json.dumps(report | changes))
        write_html_report(run_folder)
        return run_folder.html.read_text()

    assert "None: every text was classified correctly" in page(mistakes=[])
    assert "mistakes" not in page(mistakes=[], test=None, complete=False)


def test_a_report_without_a_confusion_matrix_shows_the_rest(run_folder):
    report = json.loads(run_folder.report.read_text())
    report["test"]["confusion"] = None
    run_folder.report.write_text(json.dumps(report))
    write_html_report(run_folder)
    page = run_folder.html.read_text()
    assert page.count("<svg") == 5 and "Scores by class" in page


def test_names_of_classes_are_text_in_the_drawings_too(run_folder):
    report = json.loads(run_folder.report.read_text())
    report["label_names"] = ["<script>a&b", "</svg><b>"]
    run_folder.report.write_text(json.dumps(report))
    write_html_report(run_folder)
    page = run_folder.html.read_text()
    drawings = "".join(part.split("</svg>")[0] for part in page.split("<svg")[1:])
    assert "&lt;script&gt;a&amp;b" in drawings and "&lt;/svg&gt;&lt;b&gt;" in drawings
    assert "<script" not in page and "<b>" not in page


def test_an_interrupted_run_shows_what_it_has(run_folder):
    report = json.loads(run_folder.report.read_text()) | {"complete": False, "test": None, "calibration": None}
    run_folder.report.write_text(json.dumps(report))
    write_html_report(run_folder)
    page = run_folder.html.read_text()
    assert f"This run was interrupted in epoch {report['epochs_run']}: there are no test scores." in page
    assert page.count("<svg") == 3 and "Scores by class" not in page and "Most confident" not in page
    run_folder.metrics.unlink()
    write_html_report(run_folder)
    page = run_folder.html.read_text()
    assert "<svg" not in page and "learning_rate = 0.02" in page


def test_damaged_files_are_named(run_folder, tmp_path):
    original = run_folder.report.read_text()
    run_folder.report.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="a file is damaged"):
        write_html_report(run_folder)
    run_folder.report.write_text(original)
    run_folder.metrics.write_text("{broken\n")
    with pytest.raises(ConfigError, match="a file is damaged"):
        write_html_report(run_folder)
    with pytest.raises(ConfigError, match="not a run folder"):
        write_html_report(RunFolder(tmp_path / "nothing"))


def test_a_browser_opens_it_without_an_error_or_a_request(run_folder, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    requests = []

    class Listening(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_CONNECT = do_GET

        def log_message(self, *_arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    Thread(target=server.serve_forever, daemon=True).start()
    report = json.loads(run_folder.report.read_text())
    report["mistakes"][0]["text"] = EVIL.format(port=server.server_port)
    run_folder.report.write_text(json.dumps(report))
    write_html_report(run_folder)

    def dump(path, name):
        # Requests to any other host go to the listening server, as to a proxy.
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path / name}", "--disable-background-networking", "--no-first-run"]
        command += ["--disable-component-update", "--disable-sync", path.as_uri()]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
        )

    done = dump(run_folder.html, "profile")
    assert done.returncode == 0, done.stderr[-500:]
    assert "<title>Run run</title>" in done.stdout and "document.title" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    assert requests == []

    loud = tmp_path / "loud.html"  # this test can fail
    loud.write_text(f"<script>console.error('oh')</script>{EVIL.format(port=server.server_port)}")
    done = dump(loud, "profile2")
    server.shutdown()
    assert "CONSOLE" in done.stderr and requests == ["/x.png"]
