"""Routes: jobs, images, OpenAI's, the encoder-decoder server's; and what they refuse."""

import base64
import hashlib
import io
import json
import socket
import sqlite3
import threading
import time
import zipfile
from dataclasses import replace
from urllib.parse import urlsplit

import openai
import pytest
import torch
import uvicorn
from PIL import Image

from dalle_pytorch.checkpoints.checkpoint import save
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.images import fit, to_pil, to_tensor
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import ServeConfig
from dalle_pytorch.serving.engine import Draw, Drawn, LocalEngine
from dalle_pytorch.serving.library import NOTES
from dalle_pytorch.serving.room import MAX_WAITING
from dalle_pytorch.text import BPETokenizer

from .conftest import Squares, colour, ended, wait_for


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw(client, **body):
    """A job that has ended."""
    answer = client.post("/v1/jobs", json={"prompt": "a", **body})
    assert answer.status_code == 202, answer.text
    return ended(client, answer.json()["id"])


# ---- jobs and images


def test_a_job_ends_with_its_images(serve, squares):
    client = serve(squares)
    job = draw(client, prompt="a red <b>apple</b>", n=2, num_candidates=4, seed=3)
    assert (job["state"], job["progress"], job["error"]) == ("succeeded", 1.0, None)
    assert [image["place"] for image in job["images"]] == [0, 1]
    for image in job["images"]:
        with Image.open(io.BytesIO(client.get(image["url"]).content)) as picture:
            assert picture.getpixel((0, 0)) == colour("a red <b>apple</b>", 3, image["index"])
            notes = json.loads(picture.text[NOTES])
        assert (notes["prompt"], notes["seed"], notes["index"]) == ("a red <b>apple</b>", 3, image["index"])
        row = client.get(f"/v1/images/{image['id']}").json()
        assert row["parameters"] == notes["parameters"] == job["parameters"]


def test_an_image_can_be_drawn_again_alone(serve, squares):
    client = serve(squares)
    image = draw(client, n=4, seed=5)["images"][2]
    again = draw(client, seed=5, indices=[image["index"]])["images"]
    assert len(again) == 1
    assert client.get(again[0]["url"]).content != client.get(image["url"]).content  # the notes name another job
    pixels = [Image.open(io.BytesIO(client.get(one["url"]).content)).tobytes() for one in (image, again[0])]
    assert pixels[0] == pixels[1]


def test_jobs_that_fit_together_are_drawn_together(serve, squares):
    client = serve(squares)
    squares.may_go_on.clear()
    first = client.post("/v1/jobs", json={"prompt": "first"}).json()["id"]
    wait_for(lambda: client.get(f"/v1/jobs/{first}").json()["state"] == "running")
    ids = [client.post("/v1/jobs", json={"prompt": f"{i}", "seed": i}).json() for i in range(3)]
    assert [job["position"] for job in ids] == [1, 2, 3]
    squares.may_go_on.set()
    for i, job in enumerate(ids):
        (image,) = ended(client, job["id"])["images"]
        picture = Image.open(io.BytesIO(client.get(image["url"]).content))
        assert picture.getpixel((0, 0)) == colour(f"{i}", i, 0)
    assert squares.batches == [1, 3]


def test_events_tell_the_whole_story(serve, squares):
    client = serve(squares)
    squares.seconds, squares.steps = 3.0, 12
    job = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    lines = client.get(f"/v1/jobs/{job}/events").text.splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds[-1] == "succeeded"
    assert {"running", "preview"} <= set(kinds)
    shares = [json.loads(line[6:])["progress"] for line in lines if '"progress"' in line]
    assert shares == sorted(shares)


def test_jobs_can_be_canceled(serve, squares):
    client = serve(squares)
    squares.may_go_on.clear()
    ids = [client.post("/v1/jobs", json={"prompt": "a", "n": 1 + i}).json()["id"] for i in range(2)]
    wait_for(lambda: client.get(f"/v1/jobs/{ids[0]}").json()["state"] == "running")
    assert client.delete(f"/v1/jobs/{ids[1]}").json()["state"] == "canceled"
    client.delete(f"/v1/jobs/{ids[0]}")
    threading.Timer(1.0, squares.may_go_on.set).start()
    assert ended(client, ids[0])["state"] == "canceled"
    assert client.get("/v1/images").json()["images"] == []
    assert draw(client)["state"] == "succeeded"  # the next one is not harmed


def test_a_failed_job_says_why_without_internals_and_harms_no_other(serve, squares):
    client = serve(squares)
    job = draw(client, prompt="defect")
    assert job["state"] == "failed"
    assert "secret" not in job["error"]
    assert draw(client)["state"] == "succeeded"


def test_the_library_survives_a_restart(tmp_path, tiny_vae):
    from fastapi.testclient import TestClient

    config, pages = ServeConfig(library=str(tmp_path / "library")), []
    for _ in range(2):
        with TestClient(make_app(config, lambda: Squares(tiny_vae)), base_url="http://localhost") as client:
            wait_for(lambda client=client: client.get("/readyz").status_code == 200)
            if not pages:
                draw(client, n=3)
            pages.append(client.get("/v1/images").json())
    assert pages[0] == pages[1]
    assert len(pages[0]["images"]) == 3


def test_the_library_is_paged_searched_emptied_and_packed(serve, squares):
    client = serve(squares)
    first, second = draw(client, prompt="red apple", n=3), draw(client, prompt="Blue house", n=2)
    ids = [image["id"] for image in (*second["images"], *first["images"])]
    for deleted in (None, ids[1]):  # the last image of a page may be deleted before the next page is asked for
        pages, before = [], ""
        while before is not None:
            page = client.get(f"/v1/images?limit=2{before}").json()
            pages += page["images"]
            before = page["next"] and f"&before={page['next']}"
            if deleted:
                client.delete(f"/v1/images/{deleted}")
        assert [image["id"] for image in pages] == ids
    ids.pop(1)
    assert client.get("/v1/images?before=nothing").status_code == 422
    assert client.get("/v1/images?search=%00").status_code == 422
    found = client.get("/v1/images?search=blue").json()["images"]
    assert [image["id"] for image in found] == ids[:1]
    with zipfile.ZipFile(io.BytesIO(client.get(f"/v1/jobs/{first['id']}/images.zip").content)) as packed:
        assert len(packed.namelist()) == 3
        assert packed.testzip() is None
    assert client.delete(f"/v1/images/{ids[0]}").status_code == 204
    assert client.get(f"/v1/images/{ids[0]}.png").status_code == 404
    assert len(client.get("/v1/images").json()["images"]) == 3


def test_a_key_of_the_client_makes_one_job(serve, squares):
    client, headers = serve(squares), {"Idempotency-Key": "order-7"}
    one, two = (client.post("/v1/jobs", json={"prompt": "a"}, headers=headers).json() for _ in range(2))
    assert one["id"] == two["id"]
    assert client.post("/v1/jobs", json={"prompt": "b"}, headers=headers).status_code == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"prompt": ""}, 422),
        ({"prompt": "x" * 41}, 422),
        ({"prompt": "forbidden"}, 422),
        ({"prompt": "a", "n": 0}, 422),
        ({"prompt": "a", "n": 9}, 422),
        ({"prompt": "a", "n": 3, "num_candidates": 2}, 422),
        ({"prompt": "a", "indices": [1, 1]}, 422),
        ({"prompt": "a", "temperature": -1}, 422),
        ({"prompt": "a", "top_p": 0}, 422),
        ({"prompt": "a", "seed": -1}, 422),
        ({"prompt": "a", "unknown": 1}, 422),
        ({"prompt": "a", "priority": 5}, 422),
        ({"prompt": "a\u0000b"}, 422),
        ({"prompt": "a", "negative_prompt": "\u0000"}, 422),
        ({"prompt": "a", "n": 10**12}, 422),
        ({"prompt": "a", "top_k": 10**30}, 422),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(serve, squares, body, status):
    client = serve(squares, images=8, prompt=40)
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_what_never_fits_is_not_put_off(serve, squares):
    """422 and no Retry-After; and a retried job is not counted twice."""
    client = serve(squares, hourly=6)
    assert client.post("/v1/jobs", json={"prompt": "a", "n": 7}).status_code == 422
    client.post("/v1/queue/pause")
    job = client.post("/v1/jobs", json={"prompt": "a", "n": 6}).json()["id"]
    client.delete(f"/v1/jobs/{job}")
    assert client.get(f"/v1/jobs/{job}/images.zip").status_code == 409
    assert client.post(f"/v1/jobs/{job}/retry").json()["state"] == "queued"
    assert client.get(f"/v1/jobs/{job}").json()["eta_seconds"] is None
    client.post("/v1/queue/resume")
    assert ended(client, job)["state"] == "succeeded"


def test_the_queue_is_bounded(serve, squares):
    client = serve(squares, owned=2)
    squares.may_go_on.clear()
    first = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    wait_for(lambda: client.get(f"/v1/jobs/{first}").json()["state"] == "running")
    answers = [client.post("/v1/jobs", json={"prompt": "a"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert int(answers[-1].headers["retry-after"]) > 0
    squares.may_go_on.set()


def test_an_owner_may_ask_for_so_many_images_an_hour(serve, squares, tmp_path):
    """Candidates count, refused jobs do not; once the hour is over there is room again."""
    client = serve(squares, hourly=10)
    assert draw(client, n=2, num_candidates=6)["state"] == "succeeded"
    refused = client.post("/v1/jobs", json={"prompt": "a", "n": 5})
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        429, "6 images in the last hour and 5 more, 10 at most",
    )  # fmt: skip
    assert 3590 <= int(refused.headers["retry-after"]) <= 3601
    assert draw(client, n=4)["state"] == "succeeded"
    with sqlite3.connect(tmp_path / "library" / "ledger.sqlite") as rows:
        rows.execute("UPDATE jobs SET created = created - 3601")
    assert draw(client, n=5)["state"] == "succeeded"


def test_an_image_is_found_by_what_it_shows(serve, squares, tiny_clip):
    """In the order of the CLIP's own scores, and no more once it is deleted."""
    squares.clip = clip = searchable(tiny_clip)
    client = serve(squares)
    images = draw(client, n=6)["images"]
    found = client.get("/v1/images", params={"similar": "red"}).json()
    assert found["complete"]
    pixels = [to_tensor(Image.open(io.BytesIO(client.get(image["url"]).content))) for image in images]
    scores = clip.score(torch.stack(pixels), "red")
    wanted = [images[at]["id"] for at in scores.argsort(descending=True)]
    assert [image["id"] for image in found["images"]] == wanted
    assert [image["cosine"] for image in found["images"]] == pytest.approx(sorted(scores.tolist())[::-1], abs=2e-3)
    assert client.delete(f"/v1/images/{wanted[0]}").status_code == 204
    later = client.get("/v1/images", params={"similar": "red", "limit": 2}).json()["images"]
    assert [image["id"] for image in later] == wanted[1:3]
    assert client.get("/v1/images", params={"similar": "red", "search": "a"}).status_code == 422


def test_a_library_without_a_clip_says_so(serve, squares):
    answer = serve(squares).get("/v1/images", params={"similar": "red"})
    assert (answer.status_code, "clip=" in answer.text) == (422, True)


# ---- OpenAI's client, over a real socket


@pytest.fixture
def url(tmp_path, squares):
    """Address of a server on a port of its own."""
    app = make_app(ServeConfig(library=str(tmp_path / "library")), lambda: squares)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started and app.state.hub.engine is not None)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def test_the_openai_client_draws(url, squares):
    squares.seconds = 2.4
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.images.generate(model="any", prompt="a", n=2, size="8x8", extra_body={"seed": 9})
        pictures = [Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in answer.data]
        assert [picture.getpixel((0, 0)) for picture in pictures] == [colour("a", 9, 0), colour("a", 9, 1)]
        events = list(client.images.generate(model="any", prompt="a", stream=True, partial_images=2))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
        (link,) = client.images.generate(model="any", prompt="a", response_format="url").data
        assert link.url.startswith(f"{url}/v1/images/")
        with pytest.raises(openai.BadRequestError, match="8x8"):
            client.images.generate(model="any", prompt="a", size="1024x1024")


def test_the_openai_client_draws_nothing_thrice(url, squares):
    """It asks again after 409 and 500 unless it is told not to."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with pytest.raises(openai.InternalServerError, match="defect"):
            client.images.generate(model="any", prompt="defect")
        assert len(client.get("/jobs", cast_to=dict)["jobs"]) == 1
        answer = client.images.generate(model="any", prompt="a", n=None, size=None)
        assert len(answer.data) == 1


def test_who_prefers_not_to_wait_gets_the_job(url, squares):
    squares.may_go_on.clear()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.post("/images/generations", cast_to=dict, body={"prompt": "a"},
                             options={"headers": {"Prefer": "respond-async, wait=10"}})  # fmt: skip
        assert answer["state"] in ("queued", "running")
        squares.may_go_on.set()
        wait_for(lambda: client.get(f"/jobs/{answer['id']}", cast_to=dict)["state"] == "succeeded")


def test_who_hangs_up_cancels(url, squares, tmp_path):
    squares.may_go_on.clear()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1.0, max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(model="any", prompt="a")
        with sqlite3.connect(tmp_path / "library" / "ledger.sqlite") as rows:
            wait_for(lambda: rows.execute("SELECT cancel FROM jobs").fetchone()[0])
        time.sleep(1)  # two heartbeats
        squares.may_go_on.set()
        wait_for(lambda: client.get("/jobs", cast_to=dict)["jobs"][0]["state"] == "canceled")


# ---- the encoder-decoder server


def test_the_codec_gives_the_tokenizers_own_tokens_and_images(serve, squares, tiny_vae):
    client, picture = serve(squares), Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    image = to_tensor(fit(picture, 16))[None]
    wanted = tiny_vae.encode(image)
    found = client.post("/encode/16", files={"file": ("a.png", png(picture), "image/png")}).json()
    assert torch.equal(torch.tensor(found), wanted.view(1, 4, 4))
    answer = client.post("/decode?format=png", json=found)
    reconstruction = png(to_pil(tiny_vae.decode(wanted)[0]))
    assert Image.open(io.BytesIO(answer.content)).tobytes() == Image.open(io.BytesIO(reconstruction)).tobytes()
    both = client.post("/encode-decode/16?format=png", files={"file": png(picture)})
    assert both.content == answer.content
    assert client.post("/decode", content=json.dumps(found)).headers["content-type"] == "image/jpeg"  # no content type


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [16, 32, 21])
def test_images_of_every_mode_and_size_are_encoded(serve, squares, mode, size):
    """Of a size that is no multiple of the tokens' the rest is cut off, as there."""
    client = serve(squares)
    picture = Image.new(mode, (64, 48), 1 if mode in ("1", "P", "L", "I;16") else None)
    form = "TIFF" if mode == "CMYK" else "PNG"
    file = io.BytesIO()
    picture.save(file, form)
    found = client.post(f"/encode/{size}", files={"file": file.getvalue()}).json()
    assert (len(found), len(found[0]), len(found[0][0])) == (1, size // 4, size // 4)


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/encode/32", {"files": {"file": png(Image.new("RGB", (16, 64)))}}, 422),
        ("/encode/16", {"files": {"file": b"no image"}}, 415),
        ("/encode/16", {"files": {"file": png(Image.new("RGB", (64, 64)))[:60]}}, 415),
        ("/encode/16", {"data": {"other": "x"}}, 400),
        ("/encode/16", {"files": {"file": b"%!PS-Adobe-3.0 EPSF-3.0"}}, 415),
        ("/encode/seven", {"files": {"file": png(Image.new("RGB", (64, 64)))}}, 422),
        ("/encode/4", {"files": {"file": png(Image.new("RGB", (64, 64)))}}, 422),
        ("/encode/16", {"files": {"file": png(Image.new("1", (3000, 3000)))}}, 413),
        ("/decode", {"json": [[[0, 12], [1, 2]]]}, 422),
        ("/decode", {"json": [[[0, -1], [1, 2]]]}, 422),
        ("/decode", {"json": [[[0, 1], [1]]]}, 422),
        ("/decode", {"json": [[0, 1], [1, 2]]}, 422),
        ("/decode", {"json": [[[0.5, 1], [1, 2]]]}, 422),
        ("/decode", {"json": []}, 422),
        ("/decode", {"json": {"a": 1}}, 422),
        ("/decode", {"json": [[[True, 1], [1, 2]]]}, 422),
        ("/decode", {"json": [[[0, 1, 2], [1, 2, 3]]]}, 422),
        ("/decode", {"content": b"\xff{"}, 422),
        ("/decode", {"content": b"[" * 100_000}, 422),
        ("/decode?item=1", {"json": [[[0, 1], [1, 2]]]}, 422),
        ("/decode?format=exe", {"json": [[[0, 1], [1, 2]]]}, 422),
    ],
)
def test_what_the_codec_cannot_read_is_refused(serve, squares, path, options, status):
    """Where the encoder-decoder server answered 500, or its GPU was lost."""
    answer = serve(squares, pixels=1_000_000).post(path, **options)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


# ---- safety


def test_other_hosts_and_origins_are_refused(serve, squares):
    client = serve(squares, origins=["https://friend.example"])
    assert client.get("/v1/jobs", headers={"Host": "evil.example"}).status_code == 400
    for origin, status in (("http://evil.example", 403), ("null", 403), ("https://friend.example", 202), (None, 202)):
        headers = {} if origin is None else {"Origin": origin}
        answer = client.post("/v1/jobs", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == (origin if status == 202 else None)
    form = {"Content-Type": "text/plain"}  # what a page may send without asking
    assert client.post("/v1/jobs", content='{"prompt": "a"}', headers=form).status_code == 422


def test_other_requests_are_answered_while_the_codec_is_busy(serve, squares):
    """Of very many uploads a few wait, the others are told to come again."""
    client = serve(squares)
    codec, picture, answers = client.app.state.hub.codec, png(Image.new("RGB", (16, 16))), []

    def upload() -> None:
        answers.append(client.post("/encode/16", files={"file": picture}).status_code)

    with codec.lock:
        threads = [threading.Thread(target=upload) for _ in range(60)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) >= 60 - MAX_WAITING)
        assert client.get("/healthz").status_code == client.get("/v1/jobs").status_code == 200
    for thread in threads:
        thread.join()
    assert sorted(set(answers)) == [200, 503]
    assert answers.count(200) == MAX_WAITING


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1/jobs/x/y"])
def test_every_error_has_one_shape(serve, squares, path):
    client = serve(squares)
    for answer in (client.get(path), client.put("/v1/jobs", json={})):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]


def test_paths_as_they_are_written_lead_nowhere(url):
    """Over a socket, since clients tidy paths up before they send them."""
    place = urlsplit(url)
    for path in (
        "/../app.py",
        "/..%2fapp.py",
        "/%2e%2e/app.py",
        "/..\\app.py",
        "/./../app.py",
        "//../app.py",
        "/app.js/../../app.py",
    ):
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            request = f"GET {path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.split()[1] in (b"400", b"404"), path
        assert b"def make_app" not in answer


@pytest.mark.parametrize(
    "path",
    [
        "/../ledger.sqlite", "/..%2fledger.sqlite", "/%2e%2e/ledger.sqlite", "/..\\ledger.sqlite", "//etc/passwd",
        "/v1/images/..%2f..%2fledger.sqlite", "/v1/images/%2fetc%2fpasswd.png", "/v1/images/../ledger.sqlite",
        "/app.js/../../../pyproject.toml", "/v1/jobs/../images/x.png", "/v1/images/" + "0" * 32 + ".png",
    ],
)  # fmt: skip
def test_no_path_leads_out(serve, squares, path):
    answer = serve(squares).get(path)
    assert answer.status_code in (400, 404, 405)
    assert "SQLite" not in answer.text


def test_strange_headers_cost_nothing(serve, squares):
    """Thousands of ranges, line breaks and names of files."""
    client = serve(squares)
    url = draw(client)["images"][0]["url"]
    started = time.monotonic()
    for ranges in (
        "bytes=" + ",".join(f"{i}-{i}" for i in range(2000)),
        "bytes=-" + "9" * 50,
        "bytes=5-1",
        "lines=1-2",
    ):
        assert client.get(url, headers={"Range": ranges}).status_code in (200, 206, 400, 416)
    assert time.monotonic() - started < 5
    answer = client.get("/v1/jobs/x%0d%0aSet-Cookie:%20a=b/images.zip")
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers
    files = {"file": ('../../x"\r\nX: y.png', png(Image.new("RGB", (16, 16))), "text/html")}
    assert client.post("/encode/16", files=files).status_code == 200  # its name and its type mean nothing


def test_bodies_are_bounded(serve, squares):
    client = serve(squares, body_mb=0.1)
    assert client.post("/v1/jobs", json={"prompt": "a" * 200_000}).status_code == 413
    assert client.post("/encode/16", files={"file": b"x" * 200_000}).status_code == 413


def test_a_page_behind_a_proxy_with_https_may_ask(serve, squares):
    """Its Origin has another scheme than the server hears."""
    client = serve(squares)
    asked = {"json": {"prompt": "a"}}
    assert client.post("/v1/jobs", headers={"Origin": "https://127.0.0.1"}, **asked).status_code == 202
    for origin in ("https://127.0.0.1:99", "https://127.0.0.1.evil.org", "null", "https://evil.org/127.0.0.1"):
        answer = client.post("/v1/jobs", headers={"Origin": origin}, **asked)
        assert answer.status_code == 403
        assert "content-security-policy" in answer.headers


def test_pages_run_nothing_of_others(serve, squares):
    client = serve(squares)
    for path in ("/", "/app.js", "/docs.html", "/v1/jobs", "/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
    for name in ("app.js", "docs.js", "index.html", "docs.html"):
        text = client.get(f"/{name}").text
        assert "innerHTML" not in text
        assert "http://" not in text
        assert "https://" not in text


def test_each_key_has_its_own_jobs(serve, squares, tmp_path):
    file = tmp_path / "keys"
    pairs = (("ann", "old"), ("ann", "ann"), ("bob", "bob"))  # a name may have several keys
    file.write_text("".join(f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in pairs))
    client = serve(squares, keys=str(file))
    ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    for headers in ({}, {"Authorization": "Bearer eve"}, {"Authorization": "Basic ann"}, {"Authorization": "ann"}):
        assert client.post("/v1/jobs", json={"prompt": "a"}, headers=headers).status_code == 401
        assert client.get("/metrics", headers=headers).status_code == 401
        assert client.post("/decode", json=[[[0]]], headers=headers).status_code == 401
    job = client.post("/v1/jobs", json={"prompt": "a"}, headers=ann).json()["id"]
    image = ended(client, job, headers=ann)["images"][0]
    assert client.get(f"/v1/jobs/{job}/preview.png", headers=bob).status_code == 404
    assert client.get("/v1/jobs", headers=bob).json()["jobs"] == []
    big = client.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    assert big.status_code == 401  # before the body is looked at
    for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/images.zip", image["url"],
                 f"/v1/images/{image['id']}"):  # fmt: skip
        assert client.get(path, headers=ann).status_code == 200
        assert client.get(path, headers=bob).status_code == 404
    assert client.delete(f"/v1/jobs/{job}", headers=bob).status_code == 404
    assert client.delete(f"/v1/images/{image['id']}", headers=bob).status_code == 404
    assert client.get("/v1/images", headers=bob).json()["images"] == []


def test_an_open_server_needs_keys(tmp_path):
    with pytest.raises(UserError, match="keys=FILE"):
        ServeConfig(host="0.0.0.0")
    ServeConfig(host="::1")
    file = tmp_path / "keys"
    file.write_text("ann:secret\n")
    with pytest.raises(UserError, match="line 1"):
        make_app(ServeConfig(host="0.0.0.0", keys=str(file), library=str(tmp_path)))
    file.write_text(f"anyone:{'0' * 64}\n")
    with pytest.raises(UserError, match="anyone is the name"):
        make_app(ServeConfig(host="0.0.0.0", keys=str(file), library=str(tmp_path)))


def test_metrics_and_health(serve, squares):
    client = serve(squares)
    draw(client)
    assert client.get("/healthz").json() == {"status": "ok"}
    assert 'dalle_jobs{state="succeeded"} 1.0' in client.get("/metrics").text
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/jobs", "/v1/images/generations", "/encode/{size}", "/decode", "/encode-decode/{size}"} <= set(paths)


def test_a_server_whose_models_are_missing_says_so(tmp_path):
    from fastapi.testclient import TestClient

    def broken():
        raise FileNotFoundError("/secret/place")

    with TestClient(make_app(ServeConfig(library=str(tmp_path)), broken), base_url="http://localhost") as client:
        wait_for(lambda: "log says why" in client.get("/readyz").text)
        answer = client.post("/v1/jobs", json={"prompt": "a"})
        assert answer.status_code == 503
        assert "secret" not in answer.text


def test_an_image_is_compared_with_files_of_as_many_bytes(serve, squares, tiny_vae):
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    answer = serve(squares).post("/compare/16", files={"file": png(picture)})
    rows = {row["name"]: row for row in answer.json()}
    assert list(rows) == ["original", "tokens", "jpeg", "webp"]
    assert rows["tokens"]["bytes"] == 8  # 16 tokens of 12 codes: 57.4 bits
    assert rows["original"]["psnr"] == 120
    target = to_tensor(fit(picture, 16))
    with torch.no_grad():
        made = tiny_vae.decode(tiny_vae.encode(target[None]))[0]
    shown = to_tensor(Image.open(io.BytesIO(base64.b64decode(rows["tokens"]["png"]))))
    torch.testing.assert_close(shown, made.clamp(0, 1), atol=0.5 / 255 + 1e-6, rtol=0)
    wanted = float(-10 * (shown - target).square().mean().log10())
    assert rows["tokens"]["psnr"] == pytest.approx(wanted, abs=0.02)


# ---- the models


def test_images_are_the_generators_whatever_is_drawn_beside_them(make_dalle, tmp_path):
    """Three prompts with a seed each, in one batch, against each alone."""
    dalle = make_dalle(text_len=8, text_vocab_size=270, caption_dropout=0.1)
    dalle.text_tokenizer = BPETokenizer.train(["red", "green", "blue"], 270)
    dalle.config.text_vocab_size = 270
    save(dalle, tmp_path / "dalle.safetensors")
    engine = LocalEngine(str(tmp_path / "dalle.safetensors"), device=torch.device("cpu"))
    sampling = SamplingConfig(cfg_scale=2.0)
    requests = [
        Draw(prompt=p, seed=seed, indices=(0, 3), keep=2, sampling=sampling)
        for p, seed in (("red", 1), ("green", 2), ("red", 3))
    ]
    events = list(engine.draw(requests))
    drawn = {event.number: event.images for event in events if isinstance(event, Drawn)}
    assert sorted(drawn) == [0, 1, 2]
    alone = Generator(dalle)
    for number, request in enumerate(requests):
        wanted = alone.candidates(request.prompt, [0, 3], seed=request.seed, sampling=sampling)
        assert [index for _, index, _ in drawn[number]] == [0, 3]
        for (image, _, score), expected in zip(drawn[number], wanted.images, strict=True):
            assert score is None
            assert image.tobytes() == to_pil(expected).tobytes()
    with pytest.raises(UserError):
        engine.check(Draw(prompt="red " * 50, seed=0, indices=(0,), keep=1, sampling=sampling))


def test_the_top_of_an_image_stays_where_it_is_completed(make_dalle, serve, tmp_path):
    """Two images of one batch, each completed as the Generator does; and what cannot be completed."""
    dalle = make_dalle(text_len=8, text_vocab_size=270)
    dalle.text_tokenizer = BPETokenizer.train(["red"], 270)
    dalle.config.text_vocab_size = 270
    save(dalle, tmp_path / "dalle.safetensors")
    client = serve(LocalEngine(str(tmp_path / "dalle.safetensors"), device=torch.device("cpu")))
    images, generator, keep = draw(client, prompt="red", n=2, seed=1)["images"], Generator(dalle), torch.arange(16) < 8
    asked = [
        client.post("/v1/jobs", json={"prompt": "red", "n": 2, "seed": 5, "complete": {"image": i["id"], "rows": 2}})
        for i in images
    ]
    for image, answer in zip(images, asked, strict=True):
        job = ended(client, answer.json()["id"])
        original = to_tensor(Image.open(io.BytesIO(client.get(image["url"]).content)).convert("RGB"))
        wanted = generator.candidates("red", [0, 1], seed=5, given=generator.given(original, keep))
        for row, pixels in zip(job["images"], wanted.images, strict=True):
            drawn = Image.open(io.BytesIO(client.get(row["url"]).content))
            assert drawn.tobytes() == to_pil(pixels).tobytes()
    for complete, status in (
        ({"image": images[0]["id"], "rows": 4}, 422), ({"image": "0" * 32, "rows": 2}, 404),
        ({"image": "../x", "rows": 2}, 422),
    ):  # fmt: skip
        assert client.post("/v1/jobs", json={"prompt": "red", "complete": complete}).status_code == status


def test_a_job_whose_image_is_gone_fails_and_says_so(serve, squares):
    client = serve(squares)
    image = draw(client)["images"][0]["id"]
    squares.may_go_on.clear()
    client.post("/v1/jobs", json={"prompt": "before"})
    waiting = client.post("/v1/jobs", json={"prompt": "a", "complete": {"image": image, "rows": 1}}).json()["id"]
    client.delete(f"/v1/images/{image}")
    squares.may_go_on.set()
    job = ended(client, waiting)
    assert (job["state"], job["error"]) == ("failed", f"the image {image}, which this job completes, is gone")


def test_out_of_memory_halves_the_batch_and_changes_no_image(make_dalle, tmp_path, monkeypatch):
    dalle = make_dalle(text_len=8, text_vocab_size=270)
    dalle.text_tokenizer = BPETokenizer.train(["red"], 270)
    dalle.config.text_vocab_size = 270
    save(dalle, tmp_path / "dalle.safetensors")
    engine = LocalEngine(str(tmp_path / "dalle.safetensors"), device=torch.device("cpu"))
    request = Draw(prompt="red", seed=1, indices=(0, 1, 2, 3), keep=4, sampling=SamplingConfig())
    wanted = [event for event in engine.draw([request]) if isinstance(event, Drawn)]
    start, sizes = engine.generator.decoder.start, []

    def small(text, candidates=1, *args, **more):
        sizes.append(candidates)
        if candidates > 1:
            raise torch.OutOfMemoryError
        return start(text, candidates, *args, **more)

    monkeypatch.setattr(engine.generator.decoder, "start", small)
    found = [event for event in engine.draw([request]) if isinstance(event, Drawn)]
    assert sizes == [4, 2, 1, 1, 1, 1]
    for (one, _, _), (two, _, _) in zip(wanted[0].images, found[0].images, strict=True):
        assert one.tobytes() == two.tobytes()


# ---- many people


def test_people_take_turns_and_are_named(serve, squares):
    """Without keys by the name that they give, and everybody sees everything."""
    client = serve(squares)
    squares.may_go_on.clear()
    client.post("/v1/jobs", json={"prompt": "first", "seed": 1})
    wait_for(lambda: squares.batches)
    for i in range(3):
        client.post("/v1/jobs", json={"prompt": f"a{i}", "n": 2 + i}, headers={"X-Name": "J%C3%BCrgen"})
    client.post("/v1/jobs", json={"prompt": "b0"}, headers={"X-Name": "bob"})
    queue = client.get("/v1/queue/jobs").json()["jobs"]
    assert [(job["prompt"], job["person"]) for job in queue] == [
        ("first", "anyone"), ("a0", "Jürgen"), ("b0", "bob"), ("a1", "Jürgen"), ("a2", "Jürgen"),
    ]  # fmt: skip
    assert client.get("/v1/queue", headers={"X-Name": "bob"}).json()["person"] == "bob"
    squares.may_go_on.set()


def test_two_hundred_prompts_do_not_keep_another_waiting(serve, squares, tmp_path):
    """With keys; the second one's only job starts within two of the first one's."""
    file = tmp_path / "keys"
    file.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("ann", "bob")))
    client = serve(squares, keys=str(file), owned=300)
    squares.together = 1
    ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    squares.may_go_on.clear()
    lines = "\n".join(f"a{i}" for i in range(200)).encode()
    assert client.post("/v1/jobs/batch", files={"file": lines}, headers=ann).status_code == 202
    wait_for(lambda: squares.batches)
    job = client.post("/v1/jobs", json={"prompt": "b"}, headers=bob).json()
    assert job["position"] <= 2
    squares.may_go_on.set()
    ended(client, job["id"], headers=bob)
    states = [job["state"] for job in client.get("/v1/jobs?limit=200", headers=ann).json()["jobs"]]
    assert states.count("succeeded") <= 4
    assert client.post("/v1/queue/pause", headers=ann).status_code == 403


def test_the_queue_is_paused_by_those_who_may(serve, squares):
    client = serve(squares)
    assert client.post("/v1/queue/pause").json()["paused"]
    job = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    time.sleep(0.5)
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    assert not client.post("/v1/queue/resume").json()["paused"]
    assert ended(client, job)["state"] == "succeeded"


def test_a_job_that_has_not_ended_badly_cannot_be_tried_again(serve, squares):
    client = serve(squares)
    job = draw(client)
    answer = client.post(f"/v1/jobs/{job['id']}/retry")
    assert (answer.status_code, "succeeded" in answer.text) == (409, True)


def test_an_answered_key_is_answered_again(serve, squares):
    """Although the image that the request completes is gone meanwhile; an empty key is none."""
    client = serve(squares)
    image = draw(client)["images"][0]["id"]
    body, headers = {"prompt": "a", "complete": {"image": image, "rows": 1}}, {"Idempotency-Key": "k"}
    first = client.post("/v1/jobs", json=body, headers=headers).json()["id"]
    ended(client, first)
    client.delete(f"/v1/images/{image}")
    assert client.post("/v1/jobs", json=body, headers=headers).json()["id"] == first
    assert client.post("/v1/jobs", json=body).status_code == 404
    assert client.post("/v1/jobs", json=body, headers={"Idempotency-Key": ""}).status_code == 422


def searchable(tiny_clip) -> CLIP:
    clip = CLIP(replace(tiny_clip.config, text_vocab_size=260))
    clip.text_tokenizer = BPETokenizer.train(["red green"], 260)
    return clip


def test_searches_do_not_keep_other_requests_waiting(serve, squares, tiny_clip):
    squares.clip = searchable(tiny_clip)
    client = serve(squares)
    similar = client.app.state.hub.similar
    with similar.lock:
        threads = [
            threading.Thread(target=client.get, args=("/v1/images?similar=red",), daemon=True)
            for _ in range(MAX_WAITING)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: not similar.room.places._value)
        assert client.get("/v1/images?similar=red").status_code == 503
        assert client.get("/v1/jobs").status_code == 200
    for thread in threads:
        thread.join()


def test_a_damaged_file_does_not_end_a_search(serve, squares, tiny_clip):
    squares.clip = searchable(tiny_clip)
    client = serve(squares)
    images = draw(client, n=3)["images"]
    path = client.app.state.hub.library.path(images[1]["id"])
    content = bytearray(path.read_bytes())
    content[-30:-20] = bytes(10)
    path.write_bytes(content)
    found = client.get("/v1/images?similar=red").json()["images"]
    assert {image["id"] for image in found} == {images[0]["id"], images[2]["id"]}


def test_a_failed_job_can_be_tried_again(serve, squares):
    client = serve(squares)
    job = draw(client, prompt="defect")
    assert job["state"] == "failed"
    again = client.post(f"/v1/jobs/{job['id']}/retry")
    assert (again.status_code, again.json()["state"]) == (202, "queued")
    assert ended(client, job["id"])["state"] == "failed"


def test_a_list_of_prompts_becomes_jobs_or_none(serve, squares):
    client = serve(squares, owned=3)
    text = client.post("/v1/jobs/batch", files={"file": "a red apple\n\nhouse, twemoji\r\n".encode("utf-8-sig")})
    assert [ended(client, job)["prompt"] for job in text.json()["jobs"]] == ["a red apple", "house, twemoji"]
    table = b'prompt,n,seed,cfg_scale\n"a, b",2,7,1.5\nc,,,\n'
    one, two = (ended(client, job) for job in client.post("/v1/jobs/batch", files={"file": table}).json()["jobs"])
    assert (one["prompt"], one["seed"], len(one["images"]), one["parameters"]["sampling"]["cfg_scale"]) == (
        "a, b",
        7,
        2,
        1.5,
    )
    assert (two["prompt"], len(two["images"])) == ("c", 1)
    excel = b'"Prompt"; N\nd;3\n'
    (job,) = client.post("/v1/jobs/batch", files={"file": excel}).json()["jobs"]
    assert len(ended(client, job)["images"]) == 3
    before = len(client.get("/v1/jobs").json()["jobs"])
    for wrong, status, named in (
        (b"prompt,n\na,1\nb,zero\n", 422, "line 3: n"), (b"prompt,nn\na,1\n", 422, "line 2: nn"),
        (b"\n\n", 422, "no prompt"), (b"\xff\xfe", 422, "UTF-8"), (b"a\nforbidden\n", 422, "cannot be drawn"),
        (b"a\nb\nc\nd\n", 422, "3 may wait"), (b'prompt,n\n"abc"d,2\n', 422, "line 2: no CSV"),
        (b'prompt\n"abc', 422, "no CSV"), (b"prompt;n\na;1;2\n", 422, "line 2: 3 cells"),
        (b"x" * 200_000, 422, "characters"),
    ):  # fmt: skip
        answer = client.post("/v1/jobs/batch", files={"file": wrong})
        assert (answer.status_code, named in answer.text) == (status, True), answer.text
    assert len(client.get("/v1/jobs").json()["jobs"]) == before


def test_parts_of_prompts_come_from_a_file(serve, squares, tmp_path):
    assert [part["title"] for part in serve(squares).get("/v1/inspiration").json()["parts"]] == ["what", "style"]
    file = tmp_path / "parts.txt"
    file.write_text("# who\nann\nbob\n\n# where\nat sea\n")
    parts = serve(squares, inspiration=str(file)).get("/v1/inspiration").json()["parts"]
    assert parts == [{"title": "who", "choices": ["ann", "bob"]}, {"title": "where", "choices": ["at sea"]}]
    for wrong in ("who\nann\n", "# who\n"):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"parts\.txt"):
            make_app(ServeConfig(library=str(tmp_path / "other"), inspiration=str(file)))
