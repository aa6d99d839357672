// The page of a server: what it shows comes from API v1, and is put there as text, never as HTML.
const $ = (id) => document.getElementById(id);
const PAGES = ["draw", "library", "codec"];
const STATES = { queued: "waiting", running: "drawing", succeeded: "done", failed: "failed", canceled: "canceled" };

// ---- talking to the server

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try { answer = await fetch(path, { ...options, headers }); }
  catch (error) {  // no connection, or a key that no header can hold
    $("key-form").hidden = !key;
    throw new Error(`the server does not answer: ${error.message}`);
  }
  if (answer.ok) return answer;
  let message = answer.statusText;
  try { message = (await answer.json()).error.message; } catch { /* no JSON: the status says it */ }
  if (answer.status === 401) $("key-form").hidden = false;
  throw new Error(message);
}

const json = async (path, options) => (await ask(path, options)).json();
const post = (path, body) => json(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// Images need the key as well, which an <img> cannot send.
async function show(img, path) {
  const answer = await ask(path);
  if (answer.status === 204) return false;  // no preview yet
  const url = URL.createObjectURL(await answer.blob());
  img.onload = () => URL.revokeObjectURL(url);
  img.src = url;
  img.hidden = false;
  return true;
}

function tell(error) {
  $("notice").textContent = error ? error.message || String(error) : "";
  $("notice").hidden = !error;
}

const attempt = (action) => async (event) => {
  event?.preventDefault();
  tell(null);
  try { await action(event); } catch (error) { tell(error); }
};

// ---- jobs

const cards = new Map();

function cardOf(id) {
  if (!cards.has(id)) {
    const card = $("job-template").content.firstElementChild.cloneNode(true);
    cards.set(id, card);
    $("jobs").prepend(card);
    $("no-jobs").hidden = true;
  }
  return cards.get(id);
}

async function render(job) {
  const card = cardOf(job.id);
  card.open = ["queued", "running"].includes(job.state);
  const part = (name) => card.querySelector(name), over = !card.open;
  part("h2").textContent = job.prompt;
  const ahead = job.state === "queued" && job.position ? `, ${job.position} before it` : "";
  const seconds = job.finished && job.started ? `, ${(job.finished - job.started).toFixed(1)} s` : "";
  part(".status").textContent = `${STATES[job.state]}${ahead}${seconds}, seed ${job.seed}${job.error ? `: ${job.error}` : ""}`;
  part("progress").value = job.progress;
  part("progress").hidden = over;
  part(".cancel").hidden = over;
  part(".cancel").onclick = attempt(async () => render(await json(`/v1/jobs/${job.id}`, { method: "DELETE" })));
  part(".again").hidden = !over;
  part(".again").onclick = attempt(() => submit({ ...bodyOf(job), seed: undefined }));
  part(".zip").hidden = job.state !== "succeeded";
  part(".zip").onclick = attempt(() => download(`/v1/jobs/${job.id}/images.zip`, `${job.id}.zip`));
  if (over) part(".preview").hidden = true;
  if (job.state === "running" && job.progress > 0 && job.progress !== card.progress) {
    card.progress = job.progress;
    show(part(".preview"), `/v1/jobs/${job.id}/preview.png?${job.progress}`).then((shown) => { if (shown) part(".preview").hidden = !card.open; }, () => {});
  }
  if (job.images && !part(".grid").childElementCount) part(".grid").append(...job.images.map(figureOf));
}

function bodyOf(job) {
  const { prompt, seed, indices, keep, sampling, negative_prompt, complete } = job.parameters;
  const { temperature, top_k, top_p, min_p, cfg_scale } = sampling;
  return { prompt, seed, n: keep, num_candidates: indices.length, negative_prompt, complete, temperature, top_k, top_p, min_p, cfg_scale };
}

function figureOf(image) {
  const figure = $("image-template").content.firstElementChild.cloneNode(true), img = figure.querySelector("img");
  img.alt = `${image.prompt}, image ${image.place + 1}`;
  const score = image.score === null ? "" : ` · ${image.score.toFixed(3)}`;
  figure.querySelector("figcaption").textContent = location.hash === "#library" ? image.prompt : `#${image.index}${score}`;
  figure.querySelector("figcaption").title = `${image.prompt}, seed ${image.seed}, index ${image.index}${score}`;
  for (const button of figure.querySelectorAll("button")) button.setAttribute("aria-label", `${button.textContent} image ${image.place + 1} of ${image.prompt}`);
  figure.querySelector(".redraw").onclick = attempt(async () => {
    const row = await json(`/v1/images/${image.id}`);
    location.hash = "#draw";
    await submit({ ...bodyOf(row), n: 1, num_candidates: undefined, indices: [row.index] });
  });
  figure.querySelector(".complete").onclick = attempt(async () => {
    const row = await json(`/v1/images/${image.id}`), { grid_size } = await json("/readyz");
    location.hash = "#draw";
    const count = Number(document.querySelector(".settings [name=n]").value);
    await submit({ ...bodyOf(row), seed: undefined, n: count, num_candidates: count, complete: { image: image.id, rows: grid_size >> 1 } });
  });
  figure.querySelector(".delete").onclick = attempt(async () => {
    if (!confirm("Delete this image for good?")) return;
    await ask(`/v1/images/${image.id}`, { method: "DELETE" });
    figure.remove();
  });
  show(img, image.url).catch(tell);
  return figure;
}

async function submit(body) {
  await render(await post("/v1/jobs", body));
  watch();
}

// All open jobs are asked for together: a stream for each would take up the browser's few connections.
let watching = false;

async function watch() {
  if (watching) return;
  watching = true;
  try {
    while ([...cards.values()].some((card) => card.open)) {
      await new Promise((resolve) => setTimeout(resolve, 400));
      try { await showJobs(); tell(null); } catch (error) { tell(error); await new Promise((resolve) => setTimeout(resolve, 2000)); }
    }
  } finally { watching = false; }
}

async function download(path, name) {
  const link = document.createElement("a"), url = URL.createObjectURL(await (await ask(path)).blob());
  Object.assign(link, { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

$("prompt-form").onsubmit = attempt(async () => {
  const body = { prompt: $("prompt").value };
  for (const input of document.querySelectorAll(".settings input")) if (input.value !== "") body[input.name] = Number(input.value);
  body.num_candidates = Math.max(body.num_candidates ?? body.n, body.n);
  await submit(body);
});

async function showJobs() {
  const { jobs } = await json("/v1/jobs?limit=20");
  for (const job of jobs.reverse()) if (cards.get(job.id)?.open ?? true) await render(job);
  for (const [id, card] of cards) if (card.open && !jobs.some((job) => job.id === id)) await render(await json(`/v1/jobs/${id}`));
}

// ---- library

const PAGE = 48;
let shown = 0, last = null;

async function showImages(anew) {
  if (anew) { shown = 0; last = null; $("images").replaceChildren(); }
  const words = $("search").value.trim(), similar = $("meaning").checked && words !== "";
  const query = new URLSearchParams({ limit: PAGE, ...(similar ? { similar: words } : { search: words, ...(last ? { before: last } : {}) }) });
  const { images } = await json(`/v1/images?${query}`);
  shown += images.length;
  last = images.at(-1)?.id ?? last;
  $("images").append(...images.map(figureOf));
  $("more").hidden = similar || images.length < PAGE;
  $("no-images").hidden = shown > 0;
}

$("search-form").onsubmit = attempt(() => showImages(true));
$("more").onclick = attempt(() => showImages(false));

// ---- codec

let tokens = null, perturbing = false;

async function decoded(grid) {
  const answer = await ask("/decode?format=png", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(grid) });
  const url = URL.createObjectURL(await answer.blob());
  $("decoded").onload = () => URL.revokeObjectURL(url);
  $("decoded").src = url;
}

$("file").onchange = () => { if ($("file").files[0]) $("original").src = URL.createObjectURL($("file").files[0]); };

async function upload(route, size) {
  const form = new FormData();
  form.append("file", $("file").files[0]);
  return json(`/${route}/${size}`, { method: "POST", body: form });
}

$("codec-form").onsubmit = attempt(async () => {
  tokens = await upload("encode", $("size").value);
  await decoded(tokens);
  $("codec-note").textContent = `${tokens[0].length} x ${tokens[0][0].length} tokens`;
  for (const name of ["perturb", "compare", "benchmark"]) $(name).disabled = false;
});

$("compare").onclick = attempt(async () => {
  const rows = await upload("compare", $("size").value);
  $("comparison").replaceChildren(...rows.map(({ name, bytes, psnr, png }) => {
    const figure = document.createElement("figure"), img = document.createElement("img"), note = document.createElement("figcaption");
    Object.assign(img, { src: `data:image/png;base64,${png}`, alt: name });
    note.textContent = name === "original" ? `original file: ${bytes} bytes` : `${name}: ${bytes} bytes, ${psnr} dB`;
    figure.append(img, note);
    return figure;
  }));
});

$("benchmark").onclick = attempt(async () => {
  const body = $("speeds").tBodies[0], picture = await createImageBitmap($("file").files[0]), RUNS = 10;
  $("speeds").hidden = false;
  body.replaceChildren();
  for (const size of [64, 128, 256, 512].filter((side) => side <= Math.min(picture.width, picture.height))) {
    const start = performance.now();
    for (let run = 0; run < RUNS; run++) await upload("encode", size);
    const row = body.insertRow();
    row.insertCell().textContent = size;
    row.insertCell().textContent = (1000 * RUNS / (performance.now() - start)).toFixed(1);
  }
});

function stopPerturbing() {
  perturbing = false;
  $("perturb").textContent = "Perturb";
}

$("perturb").onclick = attempt(async () => {
  if (perturbing) return stopPerturbing();
  perturbing = true;
  $("perturb").textContent = "Stop";
  try {
    while (perturbing && tokens) {
      const row = tokens[0][Math.floor(Math.random() * tokens[0].length)], at = Math.floor(Math.random() * row.length), old = row[at];
      row[at] = Math.max(0, old + (Math.random() < 0.5 ? -1 : 1));
      // one above the last code is refused
      try { await decoded(tokens); } catch (error) { if (row[at] <= old) throw error; row[at] = old; }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  } finally { stopPerturbing(); }
});

// ---- pages

// What the server allows, once its models are loaded.
async function limit() {
  try {
    const { limits } = await json("/readyz");
    $("prompt").maxLength = limits.prompt;
    for (const name of ["n", "num_candidates"]) {
      const input = document.querySelector(`.settings [name=${name}]`);
      input.max = limits.images;
      if (Number(input.value) > limits.images) input.value = limits.images;
    }
  } catch { /* not loaded yet: a job that asks for too much is refused with the number */ }
}

const go = attempt(async () => {
  const page = PAGES.includes(location.hash.slice(1)) ? location.hash.slice(1) : "draw";
  for (const name of PAGES) $(name).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (page !== "codec") stopPerturbing();
  if (page === "draw") { $("prompt").focus(); await limit(); await showJobs(); watch(); }
  if (page === "library") await showImages(true);
  if (page === "codec" && !$("size").value) $("size").value = (await json("/readyz")).image_size;
});

$("key-form").onsubmit = attempt(async () => {
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  await go();
});

window.addEventListener("hashchange", go);
go();
