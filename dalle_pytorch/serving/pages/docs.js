// The routes of openapi.json as text. (FastAPI's own pages load their scripts from another site.)
const resolve = (api, schema) => (schema.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema);
const kind = (schema) => schema.type || (schema.anyOf || []).map((one) => one.type || "object").join(" or ") || "any";

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

const api = await (await fetch("openapi.json")).json();
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, route] of Object.entries(methods)) {
    const part = element("section", "", element("code", `${method.toUpperCase()} ${path}`), element("p", route.description || route.summary));
    part.className = "route";
    const rows = (route.parameters || []).filter((one) => one.name !== "authorization").map((one) => [one.name, kind(one.schema), one.description || ""]);
    const body = route.requestBody && Object.values(route.requestBody.content)[0].schema;
    for (const [name, schema] of Object.entries((body && resolve(api, body).properties) || {})) {
      rows.push([name, kind(schema), schema.description || (schema.default === undefined ? "" : `default: ${schema.default}`)]);
    }
    const list = element("ul");
    for (const [name, type, text] of rows) list.append(element("li", `${name} (${type})${text ? ": " + text : ""}`));
    part.append(list);
    document.getElementById("routes").append(part);
  }
}
