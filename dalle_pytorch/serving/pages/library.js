// The library: images by prompt, the newest first.
import { $, attempt, download, json, tell } from "./api.js";
import { figureOf, fill } from "./draw.js";

const PAGE = 48, REFRESH = 10_000;
let shown = 0, pages = 0, last = null, timer = null, busy = false;

// Images of one job under its prompt, date, seed and speed.
function groupOf(image) {
  const group = document.createElement("article"), title = document.createElement("h2"), note = document.createElement("p");
  const grid = document.createElement("div"), buttons = document.createElement("div");
  group.className = "job";
  group.dataset.job = image.job;
  title.textContent = image.prompt;
  const speed = image.seconds ? `, ${image.seconds.toFixed(1)} s, ${(image.seconds / image.drawn).toPrecision(2)} s an image` : "";
  note.textContent = `${new Date(image.created * 1000).toLocaleString()}, seed ${image.seed}${speed}`;
  note.className = "status";
  grid.className = "grid";
  buttons.className = "row buttons";
  const button = (text, action) => Object.assign(document.createElement("button"), { textContent: text, onclick: attempt(action) });
  buttons.append(
    button("Use these settings", async () => fill((await json(`/v1/jobs/${image.job}`)).parameters)),
    button("Download all", () => download(`/v1/jobs/${image.job}/images.zip`, `${image.job}.zip`)),
  );
  group.append(title, note, grid, buttons);
  return group;
}

async function showImages(anew) {
  if (busy) return;
  busy = true;
  try { await showPage(anew); } finally { busy = false; }
}

async function showPage(anew) {
  const words = $("search").value.trim(), similar = $("meaning").checked && words !== "";
  if (anew) last = null;
  const query = new URLSearchParams({ limit: PAGE, ...(similar ? { similar: words } : { search: words, ...(last ? { before: last } : {}) }) });
  const { images, next, complete } = await json(`/v1/images?${query}`);
  if (anew) { shown = pages = 0; $("images").replaceChildren(); }
  pages++;
  shown += images.length;
  last = next;
  let group = $("images").lastElementChild;
  if (similar) {
    group = document.createElement("div");
    group.className = "grid";
    group.append(...images.map((image) => figureOf(image, image.prompt)));
    $("images").append(group);
  } else {
    for (const image of images) {
      if (group?.dataset.job !== image.job) $("images").append(group = groupOf(image));
      group.querySelector(".grid").append(figureOf(image));
    }
  }
  $("more").hidden = !next;
  $("no-images").hidden = shown > 0;
  $("library-status").textContent = shown ? `${new Date().toLocaleTimeString()}: ${shown} images${$("more").hidden ? "" : " and more"}${complete === false ? "; not all were compared yet: search again" : ""}` : "";
}

$("search-form").onsubmit = attempt(() => showImages(true));
$("more").onclick = attempt(() => showImages(false));
$("refresh").onchange = () => {
  clearInterval(timer);
  if ($("refresh").checked) timer = setInterval(() => { if (!$("library").hidden && !document.hidden && pages < 2) showImages(true).catch(tell); }, REFRESH);
};

export const open = () => showImages(true);
