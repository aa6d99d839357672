"""The routes of Nick's playground as its README has them, its failures, and the takeover of its library."""

import io
import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from PIL import Image

from dalle_pytorch.errors import UserError
from dalle_pytorch.serving.ledger import Ledger
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.takeover import take_over

from .conftest import colour, wait_for
from .test_killed import free_port

SQUIRREL = {
    "text": "the red squirrel dances in the moonlight, feet off the ground, backlit, photograph, golden hour",
    "num_images": "6",
    "seed": 12345,
}
"""The README's example, with the comma that it lacks."""


def uuid_of(text: str) -> uuid.UUID:
    found = uuid.UUID(text)
    assert (str(found), found.version) == (text, 4)
    return found


def library_of(client, count: int) -> list[dict]:
    """The library, once it has so many prompts."""
    return wait_for(lambda: (found := client.get("/getlibrary").json()) and len(found) == count and found)


def test_a_prompt_gets_an_id_and_then_images(serve, squares):
    """The README's example: the answer's and the library's keys are all of those, and no other."""
    client = serve(squares)
    answer = client.post("/prompt", json=SQUIRREL)
    assert (answer.status_code, list(answer.json())) == (200, ["queue_id"])
    queue_id = answer.json()["queue_id"]
    uuid_of(queue_id)
    (group,) = library_of(client, 1)
    assert set(group) == {
        "creation_unixtime", "generated_images", "process_time_secs", "queue_id", "text_prompt", "seed",
    }  # fmt: skip
    assert (group["queue_id"], group["text_prompt"], group["seed"]) == (queue_id, SQUIRREL["text"], 12345)
    assert (type(group["creation_unixtime"]), type(group["process_time_secs"])) == (float, float)
    assert len(group["generated_images"]) == 6
    for index, path in enumerate(group["generated_images"]):
        top, folder, file = path.split("/")
        assert (top, folder) == ("library", queue_id)
        uuid_of(file.removesuffix(".png"))
        image = client.get(f"/{path}")
        assert image.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(image.content)) as picture:
            assert picture.getpixel((0, 0)) == colour(SQUIRREL["text"], 12345, index)


def test_the_queue_has_what_is_drawn_first_and_gives_all_fields_back(serve, squares):
    client = serve(squares)
    squares.may_go_on.clear()
    more = {"gen_top_k": 5, "gen_top_p": 0.5, "temperature": 0, "condition_scale": 3.5, "mine": "x"}
    ids = [client.post("/prompt", json=SQUIRREL).json()["queue_id"]]
    wait_for(lambda: squares.batches)
    ids.append(client.post("/prompt", json={"text": "second", "num_images": 2, "seed": "0", **more}).json()["queue_id"])
    ids.append(client.post("/prompt", json={"text": "third", "num_images": 2, "gen_top_p": None}).json()["queue_id"])
    first, second, third = client.get("/queue_status").json()
    assert first == {**SQUIRREL, "num_images": 6, "queue_id": ids[0]}
    assert second == {"text": "second", "num_images": 2, "seed": 0, **more, "queue_id": ids[1]}
    assert third == {"text": "third", "num_images": 2, "seed": 0, "queue_id": ids[2]}
    squares.may_go_on.set()
    groups = library_of(client, 3)
    assert [group["queue_id"] for group in groups] == ids[::-1]
    assert groups[0]["seed"] != groups[1]["seed"] != 0  # of their own, and shown
    assert client.get("/queue_status").json() == []
    job = client.get(f"/v1/jobs/{uuid.UUID(ids[1]).hex}").json()["parameters"]["sampling"]
    assert (job["top_k"], job["top_p"], job["temperature"], job["cfg_scale"]) == (5, 0.5, 0.01, 3.5)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"text": "a", "seed": 1}, "num_images"),
        ({"num_images": 2, "seed": 1}, "text"),
        ({"text": "a", "num_images": 0}, "num_images"),
        ({"text": "a", "num_images": -4}, "num_images"),
        ({"text": "a", "num_images": 10**9}, "64 images at most"),
        ({"text": "a", "num_images": "many"}, "num_images"),
        ({"text": "a", "num_images": 2, "seed": -1}, "seed"),
        ({"text": "a", "num_images": 2, "seed": 2**32 + 1}, "seed"),
        ({"text": "a", "num_images": 2, "temperature": "hot"}, "temperature"),
        ({"text": "", "num_images": 2}, "text"),
        ({"text": "a", "num_images": 2, "more": "x" * 3000}, "2000 characters"),
        ([1, 2], ""),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(serve, squares, body, named):
    answer = serve(squares).post("/prompt", json=body)
    assert answer.status_code == 422
    assert named in answer.json()["error"]["message"]


@pytest.mark.parametrize("more", [b'"\\ud800"', b"NaN", b'"\\u0000"'])
def test_a_strange_field_is_refused_and_breaks_nobodys_page(serve, squares, more):
    client = serve(squares)
    body = b'{"text": "a", "num_images": 1, "x": ' + more + b"}"
    assert client.post("/prompt", content=body, headers={"Content-Type": "application/json"}).status_code == 422
    assert client.get("/queue_status").json() == client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"text": "a", "num_images":"6" "seed":1}', b"\xff"])
def test_a_body_that_is_no_json_gets_an_answer(serve, squares, content):
    answer = serve(squares).post("/prompt", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_deleting_keeps_the_seeds_of_the_others(serve, squares):
    client = serve(squares)
    for seed in (7, 8):
        client.post("/prompt", json={"text": f"p{seed}", "num_images": 2, "seed": seed})
    last, first = library_of(client, 2)
    paths = first["generated_images"]
    assert client.post("/deleteimage", json={"path": paths[0]}).json() == {"success": True}
    assert client.get(f"/{paths[0]}").status_code == 404
    again = client.post("/deleteimage", json={"path": paths[0]})
    assert (again.status_code, again.json()["success"]) == (404, False)
    groups = client.get("/getlibrary").json()
    assert [group["seed"] for group in groups] == [8, 7]
    assert groups[1]["generated_images"] == paths[1:]
    client.post("/deleteimage", json={"path": "/" + paths[1]})  # the page sends it with and without a slash
    assert client.get("/getlibrary").json() == [last]


def test_no_path_reads_or_deletes_what_is_no_image(serve, squares, tmp_path):
    client = serve(squares)
    client.post("/prompt", json={"text": "a", "num_images": 1, "seed": 1})
    (group,) = library_of(client, 1)
    victim = tmp_path / "victim.txt"
    victim.write_text("here")
    other = group["generated_images"][0].replace(group["queue_id"], str(uuid.uuid4()))
    for path in ("../victim.txt", f"library/{group['queue_id']}", str(victim), "library/../../victim.txt", other, ""):
        answer = client.post("/deleteimage", json={"path": path})
        assert (answer.status_code, answer.json()["success"]) == (404, False)
    assert client.post("/deleteimage", json={}).status_code == 422
    for path in ("/../victim.txt", "/library/../victim.txt", f"/{other}", "/library/x/y.png", "/tmp/x.js"):
        assert client.get(path).status_code == 404
    assert victim.read_text() == "here"
    assert len(client.get("/getlibrary").json()) == 1


def test_its_pages_lead_to_ours(serve, squares):
    client = serve(squares)
    assert "<title>" in client.get("/").text
    for old, page in (
        ("index", "draw"),
        ("advanced", "advanced"),
        ("library", "library"),
        ("inspiration", "inspiration"),
    ):
        answer = client.get(f"/{old}.html", follow_redirects=False)
        assert answer.status_code == (200 if old == "index" else 307)
        if old != "index":
            assert answer.headers["location"] == f"/#{page}"
    assert client.get("/getlibrary").json() == client.get("/queue_status").json() == []
    assert [client.get("/nothing").status_code, client.post("/nothing").status_code] == [404, 405]


def test_a_client_that_stalls_blocks_nobody(tmp_path):
    """Real sockets, the real program: thirty clients announce a body and send nothing."""
    port = free_port()
    command = [sys.executable, "-m", "dalle_pytorch.commands.serve", f"port={port}", f"library={tmp_path}/library"]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    stalled = []
    try:

        def answer(request: bytes) -> bytes:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                    one.sendall(request + b"\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                    return one.recv(100)
            except OSError:
                return b""

        wait_for(lambda: b"200" in answer(b"GET /healthz HTTP/1.1"), 60)
        for _ in range(30):
            one = socket.create_connection(("127.0.0.1", port))
            one.sendall(b"POST /prompt HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n")
            stalled.append(one)
        for _ in range(5):
            assert b"200 OK" in answer(b"GET /queue_status HTTP/1.1")
    finally:
        for one in stalled:
            one.close()
        server.terminate()
        server.wait(20)


# ---- its library


def playground(folder: Path) -> tuple[str, list[str]]:
    """A library with one whole prompt, one with a broken .idx, one with a broken image; the first, and its images."""
    names = {}
    for kind in ("whole", "broken-idx", "broken-image"):
        queue_id, images = str(uuid.uuid4()), [str(uuid.uuid4()) for _ in range(2)]
        names[kind] = (queue_id, images)
        (folder / queue_id).mkdir(parents=True)
        for shade, image in enumerate(images):
            Image.new("RGB", (256, 256), (shade, 10, 20)).save(folder / queue_id / f"{image}.png")
        index = {
            "text_prompt": f"a {kind}", "num_images": 2, "queue_id": queue_id, "time_taken": 16.32, "seed": 99,
            "gen_top_k": None, "gen_top_p": 0.9, "temperature": None, "condition_scale": 20.0, "notes": "",
        }  # fmt: skip
        text = json.dumps(index) if kind != "broken-idx" else '{"text_prompt": '
        index_file = folder / queue_id / f"{queue_id}.idx"
        index_file.write_text(text)
        os.utime(index_file, (1.66e9, 1.66e9))
        if kind == "broken-image":
            (folder / queue_id / f"{images[0]}.png").write_bytes(b"\x89PNG")
    (folder / "library.json").write_text("[]")
    return names["whole"]


def test_a_playgrounds_library_is_taken_over(tmp_path, serve, squares):
    queue_id, images = playground(tmp_path / "old")
    client = serve(squares)
    ledger, library = client.app.state.hub.ledger, client.app.state.hub.library
    taken = take_over(tmp_path / "old", ledger, library, "anyone")
    assert (taken.images, taken.known, len(taken.unreadable)) == (3, 0, 2)
    group = next(group for group in client.get("/getlibrary").json() if group["text_prompt"] == "a whole")
    assert (group["queue_id"], group["seed"], group["process_time_secs"]) == (queue_id, 99, 16.32)
    assert group["creation_unixtime"] == (tmp_path / "old" / queue_id / f"{queue_id}.idx").stat().st_mtime
    assert set(group["generated_images"]) == {f"library/{queue_id}/{image}.png" for image in images}
    with Image.open(io.BytesIO(client.get(f"/library/{queue_id}/{images[1]}.png").content)) as picture:
        assert picture.getpixel((0, 0)) == (1, 10, 20)
    draw = client.post("/prompt", json={"text": "new", "num_images": 1}).json()["queue_id"]
    order = [group["queue_id"] for group in library_of(client, 3)]
    assert order[0] == draw  # what was drawn long ago comes after what is new, whenever it was taken over
    again = take_over(tmp_path / "old", ledger, library, "anyone")
    assert (again.images, again.known) == (0, 3)
    assert len(client.get("/v1/images").json()["images"]) == 4


def test_the_command_takes_a_library_over(tmp_path):
    """Also from a folder with a strange name."""
    old = tmp_path / "the old one's, [2022]"
    playground(old)
    command = [sys.executable, "-m", "dalle_pytorch.commands.serve", "import-library", str(old)]
    done = subprocess.run(
        [*command, f"library={tmp_path}/new"], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert "3 images entered" in done.stdout
    assert len(Library(tmp_path / "new").ids()) == 3


def test_a_folder_that_is_no_library_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        take_over(tmp_path / "empty", Ledger(f"sqlite:///{tmp_path}/l"), Library(tmp_path / "x"), "anyone")
