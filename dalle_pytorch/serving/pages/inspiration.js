// A prompt put together from parts, which the server reads from a text file.
import { $, attempt, json } from "./api.js";

const NONE = "";
const chosen = () => [...document.querySelectorAll("#parts select")].map((select) => select.value).filter((text) => text !== NONE);
const tellIdea = () => { $("idea").textContent = chosen().join(", "); };

function surprise() {
  for (const select of document.querySelectorAll("#parts select")) select.selectedIndex = 1 + Math.floor(Math.random() * (select.length - 1));
  tellIdea();
}

export async function open() {
  if ($("parts").childElementCount) return;
  const { parts } = await json("/v1/inspiration");
  $("parts").append(...parts.map(({ title, choices }) => {
    const label = document.createElement("label"), select = document.createElement("select");
    select.append(new Option("–", NONE), ...choices.map((choice) => new Option(choice, choice)));
    select.onchange = tellIdea;
    label.append(title, " ", select);
    return label;
  }));
  surprise();
}

$("surprise").onclick = surprise;
$("inspiration-form").onsubmit = attempt(async () => {
  $("prompt").value = chosen().join(", ");
  location.hash = "#draw";
});
