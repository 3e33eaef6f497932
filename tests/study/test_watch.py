import http.client
import threading
from contextlib import contextmanager

import pytest

from normlab.errors import InputError
from normlab.study.plan import Plan
from normlab.study.store import RunStore, lock_folder
from normlab.study.watch import make_server
from records import record, study


@contextmanager
def serving(folder):
    with make_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    for run in study()[:5]:
        store.append(run)
    return store


class TestServer:
    def test_gives_the_page_and_makes_it_again_when_a_run_has_ended(self, store, tmp_path):
        with serving(tmp_path) as server:
            answer, text = ask(server)
            assert answer.status == 200
            assert "Runs: 5 finished." in text
            head, nothing = ask(server, method="HEAD")
            assert (head.headers["ETag"], nothing) == (answer.headers["ETag"], "")
            assert server.page()[1] is server.page()[1]
            store.append(study()[5])
            again, text = ask(server)
            assert again.headers["ETag"] != answer.headers["ETag"]
            assert "Runs: 6 finished." in text

    def test_tells_how_many_runs_of_the_plan_wait(self, store, tmp_path):
        plan = Plan(norms=["batch", "running"], batch_sizes=[2, 32], lrs=[0.1, 1.0], seeds=[0, 1, 2])
        (tmp_path / "plan.toml").write_text(plan.to_toml())
        store.append(record(0.9, norm="group"))  # of an earlier plan
        with serving(tmp_path) as server:
            assert "Runs: 5 finished, 19 waiting." in ask(server)[1]

    def test_says_what_runs_and_notices_that_nothing_does(self, store, tmp_path):
        plan = Plan(norms=["batch", "running"], batch_sizes=[2, 32], lrs=[0.1, 1.0], seeds=[0, 1, 2])
        (tmp_path / "plan.toml").write_text(plan.to_toml())
        with serving(tmp_path) as server:
            with lock_folder(tmp_path):
                store.start(plan.trials()[-1].key)
                going, text = ask(server)
                assert "Runs: 5 finished, 1 running, 18 waiting." in text
            rests, text = ask(server)
            assert "Runs: 5 finished, 1 interrupted, 18 waiting." in text
            assert going.headers["ETag"] != rests.headers["ETag"]

    def test_before_the_first_run_the_page_waits(self, tmp_path):
        with serving(tmp_path) as server:
            answer, text = ask(server)
            assert answer.status == 200
            assert "No run of this study has ended yet" in text
            assert 'http-equiv="refresh"' in text

    def test_a_store_that_cannot_be_read_is_said_as_text(self, store, tmp_path):
        with open(store.path, "a") as file:
            file.write("<script>alert(1)</script>\n")
        with serving(tmp_path) as server:
            answer, text = ask(server)
            assert answer.status == 500
            assert "is not a record of a run" in text
            assert "<script>" not in text

    def test_answers_this_machine_alone_and_with_nothing_but_the_page(self, store, tmp_path):
        with serving(tmp_path) as server:
            assert server.server_address[0] == "127.0.0.1"
            for path in ("/runs.jsonl", "/../runs.jsonl", "//etc/passwd", "/%2e%2e/plan.toml"):
                assert ask(server, path)[0].status == 404
            assert ask(server, "http://other/")[0].status == 403
            for host in ("evil.example", f"evil.example:{server.server_port}", "", "localhost.evil.example:80"):
                assert ask(server, Host=host)[0].status == 403
            assert ask(server, Host="localhost:9000")[0].status == 200, "through a tunnel"
            assert ask(server, method="POST")[0].status == 501

    def test_a_port_that_cannot_be_had(self, tmp_path):
        with serving(tmp_path) as server, pytest.raises(InputError, match=r"cannot be used.*Choose another"):
            make_server(tmp_path, server.server_port)
        with pytest.raises(InputError, match="port=70000"):
            make_server(tmp_path, 70_000)


@pytest.mark.browser
def test_the_page_loads_itself_again_and_keeps_what_was_chosen(browser, store, tmp_path):
    with serving(tmp_path) as server:
        page = browser.new_page()
        requests, troubles = [], []
        page.on("request", lambda request: requests.append(request.url.partition("#")[0]))
        page.on("console", lambda message: troubles.append(message.text))
        page.goto(server.address)
        page.get_by_label("0.1", exact=True).uncheck()
        count = page.locator("#runs tbody tr").count()
        store.append(study()[5])
        page.get_by_text("Runs: 6 finished.").wait_for(timeout=15_000)
        assert not page.get_by_label("0.1", exact=True).is_checked()
        assert page.locator("#runs tbody tr").count() == count + 1
        assert set(requests) - {"data:,"} == {server.address}
        assert troubles == []
        page.close()
