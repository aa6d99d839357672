// An image as tokens, and back.
import { $, ask, attempt, json, pause, upload } from "./api.js";

let tokens = null, perturbing = false;

async function decoded(grid) {
  const answer = await ask("/decode?format=png", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(grid) });
  const url = URL.createObjectURL(await answer.blob());
  $("decoded").onload = () => URL.revokeObjectURL(url);
  $("decoded").src = url;
}

$("file").onchange = () => { if ($("file").files[0]) $("original").src = URL.createObjectURL($("file").files[0]); };

const send = (route, size) => upload(`/${route}/${size}`, $("file").files[0]);

$("codec-form").onsubmit = attempt(async () => {
  tokens = await send("encode", $("size").value);
  await decoded(tokens);
  $("codec-note").textContent = `${tokens[0].length} x ${tokens[0][0].length} tokens`;
  for (const name of ["perturb", "compare", "benchmark"]) $(name).disabled = false;
});

$("compare").onclick = attempt(async () => {
  const rows = await send("compare", $("size").value);
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
    for (let run = 0; run < RUNS; run++) await send("encode", size);
    const row = body.insertRow();
    row.insertCell().textContent = size;
    row.insertCell().textContent = (1000 * RUNS / (performance.now() - start)).toFixed(1);
  }
});

export function stop() {
  perturbing = false;
  $("perturb").textContent = "Perturb";
}

$("perturb").onclick = attempt(async () => {
  if (perturbing) return stop();
  perturbing = true;
  $("perturb").textContent = "Stop";
  try {
    while (perturbing && tokens) {
      const row = tokens[0][Math.floor(Math.random() * tokens[0].length)], at = Math.floor(Math.random() * row.length), old = row[at];
      row[at] = Math.max(0, old + (Math.random() < 0.5 ? -1 : 1));
      // one above the last code is refused
      try { await decoded(tokens); } catch (error) { if (row[at] <= old) throw error; row[at] = old; }
      await pause(10);
    }
  } finally { stop(); }
});

export async function open() {
  if (!$("size").value) $("size").value = (await json("/readyz")).image_size;
}
