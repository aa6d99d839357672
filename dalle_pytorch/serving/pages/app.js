// Which page is shown; each has a module of its own.
import { $, attempt } from "./api.js";
import * as codec from "./codec.js";
import * as draw from "./draw.js";
import * as inspiration from "./inspiration.js";
import * as library from "./library.js";

const PAGES = { draw, library, inspiration, codec };

const go = attempt(async () => {
  const hash = location.hash.slice(1), advanced = hash === "advanced", page = Object.hasOwn(PAGES, hash) ? hash : "draw";
  for (const name of Object.keys(PAGES)) $(name).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${advanced ? hash : page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (page !== "codec") codec.stop();
  if (advanced) $("advanced").open = true;
  await PAGES[page].open();
});

$("key-form").onsubmit = attempt(async () => {
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
  await go();
});

window.addEventListener("hashchange", go);
go();
