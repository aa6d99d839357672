// The page that draws: the form, the jobs, the queue.
import { $, ask, attempt, download, json, pause, post, show, tell, upload } from "./api.js";

const STATES = { queued: "waiting", running: "drawing", succeeded: "done", failed: "failed", canceled: "canceled" };
const POLL = 1000;
const cards = new Map();
let mine = "";  // who the server takes me for
let ranks = true;  // whether a CLIP ranks: without one more candidates are of no use
let carried = {};  // what a job that is used again was drawn with, and the form has no field for

// ---- the form

const settings = () => document.querySelectorAll(".setting");
const counts = () => [...document.querySelectorAll("[name=count]")];

export function images() {
  const chosen = counts().find((radio) => radio.checked)?.value ?? "more";
  return Number(chosen === "more" ? $("more-images").value : chosen);
}

function request() {
  const body = { prompt: $("prompt").value, n: images() };
  for (const input of settings()) if (input.value !== "") body[input.name] = input.type === "number" ? Number(input.value) : input.value;
  const usual = ranks ? Math.min(16, Number($("more-images").max || 16)) : body.n;
  body.num_candidates = Math.max(body.num_candidates ?? usual, body.n);
  return { ...body, ...carried };
}

// Fill the form with what a job or an image was drawn with.
export function fill(parameters) {
  const body = bodyOf({ parameters });
  $("prompt").value = body.prompt;
  const radio = counts().find((each) => each.value === String(body.n)) ?? counts().at(-1);
  radio.checked = true;
  if (radio.value === "more") $("more-images").value = body.n;
  showMore();
  carry({ ...(body.min_p ? { min_p: body.min_p } : {}), ...(body.complete ? { complete: body.complete } : {}) });
  for (const input of settings()) input.value = body[input.name] ?? "";
  $("advanced").open = true;
  location.hash = "#draw";
}

function carry(more) {
  carried = more;
  const parts = [carried.complete ? "completes an image" : "", carried.min_p ? `min-p ${carried.min_p}` : ""].filter(Boolean);
  $("carried").hidden = parts.length === 0;
  $("carried-note").textContent = `As before, this ${parts.join(", ")}.`;
}

// A hidden field that does not fit would keep the form from being sent.
function showMore() {
  const more = counts().at(-1).checked;
  $("more-images").hidden = !more;
  $("more-images").disabled = !more;
}

export function bodyOf(job) {
  const { prompt, seed, indices, keep, sampling, negative_prompt, complete } = job.parameters;
  const { temperature, top_k, top_p, min_p, cfg_scale } = sampling;
  return { prompt, seed, n: keep, num_candidates: indices.length, negative_prompt, complete, temperature, top_k, top_p, min_p, cfg_scale };
}

export async function submit(body) {
  await render(await post("/v1/jobs", body));
  watch();
}

for (const radio of counts()) radio.onchange = showMore;
showMore();
$("carried-drop").onclick = () => carry({});
$("prompt-form").addEventListener("invalid", () => { $("advanced").open = true; }, true);
$("prompt-form").onsubmit = attempt(() => submit(request()));
$("name").value = localStorage.getItem("name") ?? "";
$("name").onchange = () => localStorage.setItem("name", $("name").value.trim());
$("list").onchange = attempt(async () => {
  const [file] = $("list").files;
  if (!file) return;
  try { await upload("/v1/jobs/batch", file); } finally { $("list").value = ""; }
  await showJobs();
  watch();
});

// ---- jobs

function cardOf(id) {
  if (!cards.has(id)) {
    const card = $("job-template").content.firstElementChild.cloneNode(true);
    cards.set(id, card);
    $("jobs").prepend(card);
    $("no-jobs").hidden = true;
  }
  return cards.get(id);
}

function statusOf(job) {
  const parts = [STATES[job.state]];
  if (job.state === "queued" && job.position) parts.push(`${job.position} before it`);
  if (job.state === "queued" && job.eta_seconds) parts.push(`about ${Math.ceil(job.eta_seconds)} s`);
  if (job.finished && job.started) parts.push(`${(job.finished - job.started).toFixed(1)} s`);
  parts.push(`seed ${job.seed}`);
  return parts.join(", ") + (job.error ? `: ${job.error}` : "");
}

async function render(job) {
  const card = cardOf(job.id);
  card.open = ["queued", "running"].includes(job.state);
  const part = (name) => card.querySelector(name), over = !card.open;
  part("h2").textContent = job.prompt;
  part(".status").textContent = statusOf(job);
  part("progress").value = job.progress;
  part("progress").hidden = over;
  part(".cancel").hidden = over;
  part(".cancel").onclick = attempt(async () => render(await json(`/v1/jobs/${job.id}`, { method: "DELETE" })));
  part(".retry").hidden = !["failed", "canceled"].includes(job.state);
  part(".retry").onclick = attempt(async () => { await render(await post(`/v1/jobs/${job.id}/retry`, {})); watch(); });
  part(".again").hidden = job.state !== "succeeded";
  part(".again").onclick = attempt(() => submit({ ...bodyOf(job), seed: undefined }));
  part(".reuse").hidden = !over;
  part(".reuse").onclick = attempt(async () => fill(job.parameters));
  part(".zip").hidden = job.state !== "succeeded";
  part(".zip").onclick = attempt(() => download(`/v1/jobs/${job.id}/images.zip`, `${job.id}.zip`));
  if (over) part(".preview").hidden = true;
  if (job.state === "running" && job.progress !== card.progress) {  // the first question makes the worker begin
    card.progress = job.progress;
    show(part(".preview"), `/v1/jobs/${job.id}/preview.png?${job.progress}`).then((shown) => { if (shown) part(".preview").hidden = !card.open; }, () => {});
  }
  if (job.images && !part(".grid").childElementCount) part(".grid").append(...job.images.map((image) => figureOf(image)));
}

// An image with its buttons.
export function figureOf(image, caption = null) {
  const figure = $("image-template").content.firstElementChild.cloneNode(true), img = figure.querySelector("img");
  const score = image.score === null ? "" : ` · ${image.score.toFixed(3)}`, on = (name, action) => { figure.querySelector(name).onclick = attempt(action); };
  img.alt = `${image.prompt}, image ${image.place + 1}`;
  figure.querySelector("figcaption").textContent = caption ?? `#${image.index}${score}`;
  figure.querySelector("figcaption").title = `${image.prompt}, seed ${image.seed}, index ${image.index}${score}`;
  for (const button of figure.querySelectorAll("button")) button.setAttribute("aria-label", `${button.textContent} image ${image.place + 1} of ${image.prompt}`);
  on(".redraw", async () => {
    const row = await json(`/v1/images/${image.id}`);
    location.hash = "#draw";
    await submit({ ...bodyOf(row), n: undefined, num_candidates: undefined, indices: [row.index] });
  });
  on(".complete", async () => {
    const row = await json(`/v1/images/${image.id}`), { grid_size } = await json("/readyz");
    location.hash = "#draw";
    await submit({ ...bodyOf(row), seed: undefined, n: images(), num_candidates: images(), complete: { image: image.id, rows: grid_size >> 1 } });
  });
  on(".save", () => download(image.url, `${image.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}_${image.seed}_${image.index}.png`));
  on(".delete", async () => {
    if (!confirm("Delete this image for good?")) return;
    await ask(`/v1/images/${image.id}`, { method: "DELETE" });
    figure.remove();
  });
  show(img, image.url).catch(tell);
  return figure;
}

// All open jobs are asked for together: a stream for each would take up the browser's few connections.
let watching = false;

async function watch() {
  if (watching) return;
  watching = true;
  let told = false;
  try {
    while ([...cards.values()].some((card) => card.open)) {
      await pause(POLL);
      if (document.hidden) continue;
      try {
        await showOpenJobs();
        await showQueue();
        if (told) tell(null);
        told = false;
      } catch (error) { tell(error); told = true; await pause(2000); }
    }
  } finally { watching = false; }
}

async function showJobs() {
  const { jobs } = await json("/v1/jobs?limit=20");
  for (const job of jobs.reverse()) if (cards.get(job.id)?.open ?? true) await render(job);
}

async function showOpenJobs() {
  const { jobs } = await json("/v1/jobs?limit=20&state=queued&state=running");
  for (const job of jobs.reverse()) await render(job);
  for (const [id, card] of cards) if (card.open && !jobs.some((job) => job.id === id)) await render(await json(`/v1/jobs/${id}`));
}

// ---- the queue

async function showQueue() {
  const queue = await json("/v1/queue"), { limits, used } = queue;
  mine = queue.person;
  ranks = queue.ranks;
  const parts = [queue.queued + queue.running ? `${queue.running} jobs are drawn, ${queue.queued} wait` : "Nothing waits"];
  if (queue.seconds_an_image) parts.push(`${queue.seconds_an_image.toPrecision(2)} s an image`);
  parts.push(`you may ask for ${limits.images} images at once and ${limits.owned} jobs`);
  if (limits.hourly) parts.push(`${Math.max(limits.hourly - used.hour, 0)} of ${limits.hourly} images left this hour`);
  $("queue-status").textContent = (queue.paused ? "The queue is paused. " : "") + parts.join(", ");
  $("pause").hidden = !queue.may_pause;
  $("pause").textContent = queue.paused ? "Resume the queue" : "Pause the queue";
  $("pause").onclick = attempt(async () => { await post(`/v1/queue/${queue.paused ? "resume" : "pause"}`, {}); await showQueue(); });
  $("name-label").hidden = queue.keys;
  $("prompt").maxLength = limits.prompt;
  for (const input of [$("more-images"), document.querySelector("[name=num_candidates]")]) {
    input.max = limits.images;
    if (Number(input.value) > limits.images) input.value = limits.images;
  }
  for (const radio of counts()) radio.disabled = Number(radio.value) > limits.images;
  if (counts().some((radio) => radio.checked && radio.disabled)) counts().at(-1).checked = true;
  showMore();
  $("queue-list").hidden = queue.queued + queue.running === 0;
  if ($("queue-list").open && !$("queue-list").hidden) await showWaiting();
}

async function showWaiting() {
  const { jobs } = await json("/v1/queue/jobs?limit=100");
  $("queue").replaceChildren(...jobs.map((job) => {
    const item = document.createElement("li"), own = job.person === mine;
    item.textContent = `${job.prompt} (${job.count} images${job.state === "running" ? ", now" : ""}${own ? ", yours" : ""})`;
    item.classList.toggle("own", own);
    return item;
  }));
}

$("queue-list").ontoggle = attempt(async () => { if ($("queue-list").open) await showWaiting(); });

export async function open() {
  $("prompt").focus();
  await showQueue();
  await showJobs();
  watch();
}
