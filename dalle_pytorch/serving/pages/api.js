// Talking to the server. What it says is put on the page as text, never as HTML.
export const $ = (id) => document.getElementById(id);

export async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key"), name = localStorage.getItem("name");
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (name) headers["X-Name"] = encodeURIComponent(name);
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

export const json = async (path, options) => (await ask(path, options)).json();
export const post = (path, body) => json(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export function upload(path, file) {
  const form = new FormData();
  form.append("file", file);
  return json(path, { method: "POST", body: form });
}

// Images need the key as well, which an <img> cannot send. False = there is none yet.
export async function show(img, path) {
  const answer = await ask(path);
  if (answer.status === 204) return false;
  const url = URL.createObjectURL(await answer.blob());
  img.onload = () => URL.revokeObjectURL(url);
  img.src = url;
  img.hidden = false;
  return true;
}

export async function download(path, name) {
  const link = document.createElement("a"), url = URL.createObjectURL(await (await ask(path)).blob());
  Object.assign(link, { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

export function tell(error) {
  $("notice").textContent = error ? error.message || String(error) : "";
  $("notice").hidden = !error;
}

export const attempt = (action) => async (event) => {
  event?.preventDefault();
  tell(null);
  try { await action(event); } catch (error) { tell(error); }
};

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
