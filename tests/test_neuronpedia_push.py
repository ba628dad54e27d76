import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from neuronpedia_server import KEY, NeuronpediaServer, neuronpedia_server
from planted_dashboards import DEAD, planted_dashboards
from test_neuronpedia_export import LABELS, PATH, SOURCE, VECTOR

from sae_emotion_plugin.publishing import neuronpedia_push, neuronpedia_requests
from sae_emotion_plugin.publishing.neuronpedia_api import NeuronpediaApi, PushStopped, Refused, TryAgain
from sae_emotion_plugin.publishing.neuronpedia_export import export_neuronpedia
from sae_emotion_plugin.publishing.neuronpedia_push import PushReport, push
from sae_emotion_plugin.publishing.neuronpedia_requests import planned_requests

ALIVE = [index for index in range(8) if index not in DEAD]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NeuronpediaServer]:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    with neuronpedia_server() as state:
        yield state


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "np"
    return export_neuronpedia(planted_dashboards(), LABELS, SOURCE, folder, vectors=[VECTOR]).folder


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def pushed(folder: Path, server: NeuronpediaServer, journal: Path, **given: Any) -> PushReport:
    waits: list[float] = given.pop("waits", [])
    return push(folder, server=server.url, journal=journal, sleep=waits.append, **given)


def test_a_push_brings_the_source_its_features_labels_vectors_and_lists(
    made: Path, server: NeuronpediaServer, journal: Path
) -> None:
    report = pushed(made, server, journal)
    assert list(server.sets) == [("tiny-2l", "emotion-res-8")]
    assert sorted(server.features) == ALIVE
    rows = {row["index"]: row for row in neuronpedia_requests.read_rows(made / PATH / "features")}
    feature = server.features[2]
    assert [label["text"][:13] for label in feature["explanations"]] == ["anger", "anger or fear"]
    assert feature["density"] == rows["2"]["frac_nonzero"]
    assert [logit["value"] for logit in feature["topLogits"]] == rows["2"]["pos_values"]
    own = [row for row in neuronpedia_requests.read_rows(made / PATH / "activations") if row["index"] == "2"]
    assert [row["values"] for row in feature["activations"]] == [row["values"] for row in own]
    assert [row["quantileMax"] for row in feature["activations"]] == [row["binMax"] for row in own]
    (vector,) = server.vectors
    assert vector["vectorLabel"] == "joy x 2"
    assert vector["vector"] == pytest.approx(VECTOR["vector"], rel=1e-6)
    assert {one["name"]: [item["index"] for item in one["neurons"]] for one in server.lists.values()} == {
        "anger · 0-emotion-res-8": ["2"],
        "fear · 0-emotion-res-8": ["2"],
        "joy · 0-emotion-res-8": ["0"],
    }
    assert report.answers["vector joy x 2"] == {"source": "1-neuronpedia-hook_resid_pre", "index": "0"}
    assert (report.sent, report.skipped) == (9, 0)


def test_what_would_be_sent_is_what_is_sent(made: Path, server: NeuronpediaServer, journal: Path) -> None:
    planned = list(planned_requests(made))
    pushed(made, server, journal)
    looked = ("vector/list-owned", "list/list", "list/get")
    sent = [(path, body) for kind, path, body in server.calls if kind == "POST" and path not in looked]
    assert [path for path, _ in sent] == [request.path for request in planned]
    for (path, body), request in zip(sent, planned, strict=True):
        assert path == "list/add-features" or body == request.body
    assert all(request.n_bytes > 20 for request in planned)


def test_a_plan_needs_neither_key_nor_server(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    assert [request.path for request in planned_requests(made, lists=False, create_model=True)] == [
        "model/new",
        "source-set/new",
        "feature/upload-batch",
        "vector/new",
    ]


def test_batches_have_at_most_so_many_features_and_bytes(
    made: Path, server: NeuronpediaServer, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia_requests, "MOST_FEATURES", 4)
    sizes = [len(one.body["features"]) for one in planned_requests(made) if one.path == "feature/upload-batch"]
    assert sizes == [4, 2]
    whole = max(one.n_bytes for one in planned_requests(made))
    monkeypatch.setattr(neuronpedia_requests, "MOST_BYTES", whole // 2)
    pushed(made, server, journal)
    uploads = [one for one in planned_requests(made) if one.path == "feature/upload-batch"]
    assert len(uploads) > 2
    assert max(one.n_bytes for one in uploads) <= whole // 2 + 100
    assert sorted(server.features) == ALIVE


def test_a_batch_that_is_too_large_for_the_server_is_halved(
    made: Path, server: NeuronpediaServer, journal: Path
) -> None:
    largest = max(one.n_bytes for one in planned_requests(made))
    server.most_bytes = largest // 2
    pushed(made, server, journal)
    assert sorted(server.features) == ALIVE
    server.most_bytes = 100
    with pytest.raises(PushStopped, match="answered 413: the request is too large"):
        pushed(made, server, journal.with_name("other"))


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "7"}, "slow down"),
        (500, {}, "oops"),
        (503, {}, ""),
        (502, {}, "<html>"),
        "lost",
        "refused",
    ],
)
def test_a_passing_failure_of_any_request_is_overcome_without_a_double(
    made: Path, server: NeuronpediaServer, journal: Path, failure: Any
) -> None:
    requests = len(list(planned_requests(made)))
    for place in range(requests):
        server.clear()
        server.failures = [None] * place + [failure]
        waits: list[float] = []
        report = pushed(made, server, journal.with_name(str(place)), waits=waits)
        assert waits == ([7.0] if failure[0] == 429 else [1.0])
        assert report.sent == requests
        assert sorted(server.features) == ALIVE
        assert len(server.vectors) == 1
        assert sorted(len(one["neurons"]) for one in server.lists.values()) == [1, 1, 1]


def test_a_network_that_is_lost_midway_stops_the_push_and_the_next_goes_on(
    made: Path, server: NeuronpediaServer, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia_requests, "MOST_FEATURES", 2)
    server.failures = [None, None, *["refused"] * 3]
    waits: list[float] = []
    with pytest.raises(PushStopped, match=r"no answer from .*; 2 requests are done, and the same command goes on"):
        pushed(made, server, journal, tries=3, waits=waits)
    assert waits == [1.0, 2.0]
    server.calls.clear()
    report = pushed(made, server, journal)
    assert report.skipped == 2
    assert "source-set/new" not in server.paths
    assert [feature["index"] for feature in server.created("feature/upload-batch")[0]["features"]] == ALIVE[2:4]
    assert sorted(server.features) == ALIVE
    server.calls.clear()
    assert pushed(made, server, journal).sent == 0
    assert server.calls == []


def test_ctrl_c_between_answer_and_journal_makes_no_second_vector_or_list(
    made: Path, server: NeuronpediaServer, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = len(list(planned_requests(made)))
    add = neuronpedia_push._Journal.add
    for place in range(requests):
        server.clear()
        path = journal.with_name(str(place))
        left = [place]

        def stopping(journal: Any, request: Any, answer: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            add(journal, request, answer)

        with monkeypatch.context() as patched:
            patched.setattr(neuronpedia_push._Journal, "add", stopping)
            with pytest.raises(KeyboardInterrupt):
                pushed(made, server, path)
        pushed(made, server, path)
        assert len(server.vectors) == 1
        assert [len(one["neurons"]) for one in server.lists.values()] == [1, 1, 1]


def test_a_journal_that_was_cut_off_loses_one_line_only(made: Path, server: NeuronpediaServer, journal: Path) -> None:
    whole = pushed(made, server, journal)
    journal.write_bytes(journal.read_bytes()[:-10])
    report = pushed(made, server, journal)
    assert (report.sent, report.skipped) == (1, whole.sent - 1)
    assert len(journal.read_text().splitlines()) == whole.sent
    journal.write_text("what?\n")
    with pytest.raises(ValueError, match="line 1, is no line of a journal"):
        pushed(made, server, journal)


def test_a_journal_of_one_server_says_nothing_of_another(made: Path, server: NeuronpediaServer, journal: Path) -> None:
    pushed(made, server, journal)
    with neuronpedia_server() as other:
        assert pushed(made, other, journal).skipped == 0
        assert sorted(other.features) == ALIVE


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (400, '{"error": "activations"}', "answered 400: activations"),
        (401, '{"message": "no"}', "the key in NEURONPEDIA_API_KEY is not valid there: no"),
        (403, '{"message": "Only the creator"}', "the key's owner may not do that: Only the creator"),
        (404, "", "there is no such thing"),
        (409, '{"message": "exists"}', "it exists already, or something else of that name does: exists"),
    ],
)
def test_what_trying_again_would_not_change_is_not_tried_again(
    made: Path, server: NeuronpediaServer, journal: Path, status: int, text: str, message: str
) -> None:
    server.failures = [None, (status, {}, text)]
    with pytest.raises(PushStopped, match=message) as stopped:
        pushed(made, server, journal)
    assert "feature/upload-batch" in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1
    assert server.paths.count("feature/upload-batch") == 1


def test_a_server_that_asks_for_more_patience_than_an_hour_is_left(
    made: Path, server: NeuronpediaServer, journal: Path
) -> None:
    server.failures = [(429, {"Retry-After": "7200"}, "")]
    waits: list[float] = []
    with pytest.raises(PushStopped, match="too many requests"):
        pushed(made, server, journal, waits=waits)
    assert waits == []


def test_waits_double_up_to_a_minute_and_end(made: Path, server: NeuronpediaServer, journal: Path) -> None:
    server.failures = [(429, {}, "")] * 20
    waits: list[float] = []
    with pytest.raises(PushStopped, match="429"):
        pushed(made, server, journal, waits=waits)
    assert waits == [1, 2, 4, 8, 16, 32, 60]


def test_retry_after_may_be_a_date(server: NeuronpediaServer) -> None:
    api = NeuronpediaApi(server.url)
    for head, least, most in (("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("Wed, 21 Oct 2115 07:28:00 GMT", 2e9, 4e9)):
        server.failures = [(503, {"Retry-After": head}, "")]
        with pytest.raises(TryAgain) as error:
            api.call("list/new", {"name": "x"})
        assert error.value.after is not None
        assert least <= error.value.after <= most
    server.failures = [(503, {"Retry-After": "soon"}, "")]
    with pytest.raises(TryAgain) as error:
        api.call("list/new", {"name": "x"})
    assert error.value.after is None


def test_answers_that_are_not_what_is_documented_stop_the_push(
    made: Path, server: NeuronpediaServer, journal: Path
) -> None:
    server.failures = [(200, {}, "<html>Please log in to the hotel's network</html>")]
    with pytest.raises(PushStopped, match="is not JSON"):
        pushed(made, server, journal)
    server.failures = [None, None, (200, {}, "[]")]
    with pytest.raises(PushStopped, match="not what is documented"):
        pushed(made, server, journal)


def test_the_key_is_nowhere_shown_or_written(
    made: Path,
    server: NeuronpediaServer,
    journal: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    server.failures = [(500, {}, f"the key {KEY} is fine")]
    pushed(made, server, journal)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "another-secret")
    with pytest.raises(PushStopped, match="bad key ") as stopped:
        pushed(made, server, journal.with_name("other"))
    shown = [caplog.text, *capfd.readouterr(), journal.read_text(), str(stopped.value), repr(vars(stopped.value))]
    assert not any(KEY in text or "another-secret" in text for text in shown)
    assert "the key *** is fine" in caplog.text


def test_a_key_that_is_missing_or_broken_is_refused_without_showing_it(
    made: Path, server: NeuronpediaServer, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, message in (("", "is not set"), ("sk-1\nX-Evil: 1", "cannot be a key"), ("ключ", "cannot be a key")):
        monkeypatch.setenv("NEURONPEDIA_API_KEY", key)
        with pytest.raises(ValueError, match=message) as error:
            pushed(made, server, journal)
        assert not key or key not in str(error.value)
    assert server.calls == []


@pytest.mark.parametrize("address", ["http://example.com/api", "ftp://localhost/api", "neuronpedia.org/api", ""])
def test_the_key_is_not_sent_where_others_can_read_it(server: NeuronpediaServer, address: str) -> None:
    with pytest.raises(ValueError, match="server is"):
        NeuronpediaApi(address)


def test_a_redirection_elsewhere_is_not_followed(server: NeuronpediaServer) -> None:
    with neuronpedia_server() as other:
        server.failures = [(307, {"Location": f"{other.url}/list/new"}, "")]
        with pytest.raises(Refused, match="answered 307"):
            NeuronpediaApi(server.url).call("list/new", {"name": "x"})
        assert other.calls == []


def test_a_redirection_to_www_is_the_same_server() -> None:
    api = object.__new__(NeuronpediaApi)
    api.server = "https://neuronpedia.org/api"
    moved = api._moved("list/new", "https://www.neuronpedia.org/api/list/new")
    assert moved == "https://www.neuronpedia.org/api"
    for location in (
        "http://www.neuronpedia.org/api/list/new",
        "https://www.neuronpedia.org/login",
        "https://evil.org/api/list/new",
        "",
    ):
        assert api._moved("list/new", location) is None


def test_an_export_that_is_not_sound_is_not_pushed(made: Path, server: NeuronpediaServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sound export"):
        push(tmp_path, server=server.url)
    assert server.calls == []


def test_what_the_api_does_not_take_is_refused_before_it_is_sent(tmp_path: Path, server: NeuronpediaServer) -> None:
    odd = {**VECTOR, "hook_type": "attn.hook_z"}
    folder = export_neuronpedia(planted_dashboards(), (), SOURCE, tmp_path / "a", vectors=[odd]).folder
    with pytest.raises(ValueError, match=r"no vector at blocks\.1\.attn\.hook_z"):
        list(planned_requests(folder))
    long = planted_dashboards(sequences=2, length=1025)
    folder = export_neuronpedia(long, (), SOURCE, tmp_path / "b").folder
    with pytest.raises(ValueError, match="1025 tokens; the API takes 1024"):
        list(planned_requests(folder))


def test_empty_tokens_are_replaced_for_the_api(tmp_path: Path, server: NeuronpediaServer, journal: Path) -> None:
    dashboards = planted_dashboards(known_texts=("",) * 12)
    folder = export_neuronpedia(dashboards, (), SOURCE, tmp_path / "np").folder
    pushed(folder, server, journal)
    assert {token for row in server.features[0]["activations"] for token in row["tokens"]} == {"\ufffd"}


def test_long_lists_go_in_parts(tmp_path: Path, server: NeuronpediaServer, journal: Path) -> None:
    labels = [replace(LABELS[0], feature=index) for index in range(105)]
    folder = export_neuronpedia(planted_dashboards(d_sae=105, length=2), labels, SOURCE, tmp_path / "np").folder
    pushed(folder, server, journal)
    assert [len(body["featuresToAdd"]) for body in server.created("list/add-features")] == [100, 5]
    assert [int(item["index"]) for item in server.lists["list0"]["neurons"]] == list(range(105))


def test_the_official_client_sends_the_same_bodies(
    made: Path, server: NeuronpediaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("neuronpedia")
    names = ("np_activation", "np_explanation", "np_feature", "np_list", "requests.list_request")
    activation, explanation, feature, lists, list_request = (import_module(f"neuronpedia.{name}") for name in names)
    monkeypatch.setattr(import_module("neuronpedia.requests.base_request").NPRequest, "BASE_URL", server.url)
    made_list: Any = None
    for request in planned_requests(made):
        body = request.body
        if request.path == "source-set/new":
            client.SourceSetRequest().new(body["name"], body["modelId"], body["description"], "https://example.org")
        elif request.path == "vector/new":
            client.VectorRequest().new(
                body["vectorLabel"],
                body["modelId"],
                body["layerNumber"],
                body["hookType"],
                body["vector"],
                body["vectorDefaultSteerStrength"],
            )
        elif request.path == "list/new":
            made_list = list_request.ListRequest().new(body["name"], body["description"])
        elif request.path == "list/add-features":
            items = [
                lists.NPListItem(*(one[key] for key in ("modelId", "layer", "index", "description")))
                for one in body["featuresToAdd"]
            ]
            list_request.ListRequest().add_items(made_list, items)
        else:
            place = (body["modelId"], body["source"])
            features = [
                feature.Feature(
                    *place,
                    one["index"],
                    one["density"],
                    [feature.Logit(**logit) for logit in one["topLogits"]],
                    [feature.Logit(**logit) for logit in one["bottomLogits"]],
                    [explanation.Explanation(*place, one["index"], label["text"]) for label in one["explanations"]],
                    [activation.Activation(*place, one["index"], **row) for row in one["activations"]],
                )
                for one in body["features"]
            ]
            try:
                client.FeatureRequest().upload_batch(*place, features)
            except Exception as error:
                # Its nulls for a label's method and model are what the local server refuses.
                assert "methodName" in str(error)
        sent = json.loads(
            json.dumps(server.calls[-1][2]), object_hook=lambda row: {k: v for k, v in row.items() if v is not None}
        )
        expected = {**body, "url": "https://example.org"} if request.path == "source-set/new" else dict(body)
        expected |= {"listId": sent["listId"]} if "listId" in body else {}
        assert server.calls[-1][1] == request.path
        assert sent == expected
