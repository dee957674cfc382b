"use strict";
// Lists, searches and shows latents. The data stand in script elements that never run: the index as JSON, each page of
// latents as deflated JSON in base64. Every text from them goes in as text, never as markup. The state is the address
// behind #: latent, q, level, sort, desc, page.
const ROWS = 50;
const $ = (id) => document.getElementById(id);
const pages = new Map();
const index = JSON.parse($("index").textContent);
index.search = index.label.map((label) => label.toLowerCase());
let order = [];

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function loadPage(number) {
  if (!pages.has(number)) pages.set(number, unpacked($(`page-${number}`).textContent));
  return pages.get(number);
}

function make(tag, text = null, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const state = () => new URLSearchParams(location.hash.slice(1));

function address(changes) {
  const next = state();
  for (const [name, value] of Object.entries(changes)) {
    if (value === "" || value === null) next.delete(name);
    else next.set(name, value);
  }
  return `#${next}`;
}

function change(changes) {
  history.replaceState(null, "", address(changes));
  show();
}

function levelName(level) {
  const { levels } = index.summary;
  if (levels.length > 2) return `level ${level + 1}`;
  return levels.length === 2 && level === 0 ? "shared" : "specialised";
}

function choose({ q, level, sort, desc }) {
  const wanted = q.trim().toLowerCase();
  const number = /^\d+$/.test(wanted) ? Number(wanted) : -1;
  const found = [];
  for (let id = 0; id < index.level.length; id++) {
    if (level !== "" && index.level[id] !== Number(level)) continue;
    if (wanted === "" || id === number || index.search[id].includes(wanted)) found.push(id);
  }
  const key = sort === "id" ? null : index[sort];
  if (key) found.sort((a, b) => key[a] - key[b] || a - b);
  if (desc) found.reverse();
  return found;
}

function show() {
  const at = state();
  const wanted = { q: at.get("q") ?? "", level: at.get("level") ?? "", sort: at.get("sort") ?? "id", desc: at.has("desc") };
  if ($("q").value !== wanted.q) $("q").value = wanted.q;
  $("level").value = wanted.level;
  $("sort").value = wanted.sort;
  $("reverse").checked = wanted.desc;
  order = choose(wanted);
  list(Math.max(0, Number(at.get("page") ?? 0)), at.get("latent") ?? String(index.opens));
  const latent = at.get("latent");
  $("columns").classList.toggle("open", latent !== null);
  open(Number(latent ?? index.opens));
}

function list(page, current) {
  const last = Math.max(0, Math.ceil(order.length / ROWS) - 1);
  const at = Math.min(page, last);
  const part = order.slice(at * ROWS, (at + 1) * ROWS);
  const range = order.length > ROWS ? `, ${at * ROWS + 1} to ${at * ROWS + part.length} shown` : "";
  $("count").textContent = `${order.length.toLocaleString("en")} of ${index.level.length.toLocaleString("en")} latents${range}`;
  $("list").replaceChildren(...part.map((id) => listed(id, String(id) === current)));
  $("back").disabled = at === 0;
  $("next").disabled = at === last;
  $("back").onclick = () => change({ page: at - 1 || null });
  $("next").onclick = () => change({ page: at + 1 });
}

function listed(id, current) {
  const link = make("a", null, { href: address({ latent: id }) },
    make("span", String(id), { class: "id" }),
    make("bdi", index.label[id] || "never fired", { class: index.label[id] ? "label" : "label quiet" }),
    make("span", `${levelName(index.level[id])}, ${percent(index.density[id])}`, { class: "quiet" }));
  if (current) link.setAttribute("aria-current", "true");
  return make("li", null, {}, link);
}

const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;

async function open(id) {
  if (!(id >= 0 && id < index.level.length)) {
    $("latent").replaceChildren(make("p", `There is no latent ${id}.`));
    return;
  }
  const size = index.summary.page_size;
  const { strings, latents } = await loadPage(Math.floor(id / size));
  if (Number(state().get("latent") ?? index.opens) !== id) return;
  const data = latents[id % size];
  const parts = [
    make("a", "← All latents", { href: address({ latent: null }), class: "all" }),
    make("h2", `Latent ${id}`),
    facts(id),
    relatives(id, data.related),
    histogram(data.bars, data.step),
  ];
  if (data.up) parts.push(lens(strings, data));
  parts.push(make("h3", "Where it fires most"));
  if (data.contexts.length === 0) parts.push(make("p", "It never fired on the tokens that were read.", { class: "quiet" }));
  parts.push(...data.contexts.map((context) => shownContext(strings, context, index.max[id])));
  if (data.drawn.length > 0) parts.push(make("h3", "Drawn by lot from all its firing, strongest first"));
  parts.push(...data.drawn.map(([weaker, ...context]) =>
    shownContext(strings, context, index.max[id], `, stronger than ${percent(weaker)} of its firing`)));
  $("latent").replaceChildren(...parts);
}

function facts(id) {
  const tokens = Math.round(index.density[id] * index.summary.n_tokens).toLocaleString("en");
  const told = {
    level: levelName(index.level[id]),
    "peaks on": make("bdi", index.label[id] || "nothing"),
    "fires on": `${percent(index.density[id])} of tokens (about ${tokens})`,
    "highest activation": String(index.max[id]),
  };
  const [precision, recall] = [index.precision[id], index.recall[id]];
  if (precision !== null && recall !== null) {
    told["as the rule “fires on these tokens”"] = `right on ${percent(precision)} of them, covers ${percent(recall)} of its firing`;
  }
  return make("dl", null, {}, ...Object.entries(told).map(([name, value]) => make("div", null, {}, make("dt", name), make("dd", null, {}, value))));
}

function histogram(bars, step) {
  const section = make("section");
  if (bars.length === 0) return section;
  const most = Math.max(...bars);
  const chart = make("div", null, { class: "histogram", role: "img", "aria-label": `Histogram of ${bars.length} equal steps of activation` });
  bars.forEach((count, i) => {
    const bar = make("span", null, { title: `${count.toLocaleString("en")} tokens up to ${Number((step * (i + 1)).toPrecision(3))}` });
    bar.style.setProperty("--h", (count / most).toFixed(3));
    chart.append(bar);
  });
  section.append(make("h3", "How strongly it fires"), chart,
    make("p", `Tokens by activation, from 0 to ${Number((step * bars.length).toPrecision(3))}; the highest bar is ${most.toLocaleString("en")} tokens.`, { class: "note" }));
  return section;
}

function relatives(id, links) {
  const shared = id < index.summary.n_shared;
  const other = shared ? "Specialised latents" : "Shared latents";
  const section = make("section", null, {}, make("h3", `${other} that fire with it`));
  if (links.length === 0) {
    const none = index.summary.n_shared ? "None fires with it far more often than chance." : "This dictionary is flat.";
    section.append(make("p", none, { class: "quiet" }));
    return section;
  }
  const head = ["Latent", "Peaks on", shared ? "Inside this one" : "This one inside it", "By chance", "Tokens together", "Decoder cosine"];
  const rows = links.map(([to, count, share, chance, cosine]) => make("tr", null, {},
    make("th", null, { scope: "row" }, make("a", String(to), { href: address({ latent: to }) })),
    make("td", null, {}, make("bdi", index.label[to])),
    ...[percent(share), percent(chance), count.toLocaleString("en"), cosine.toFixed(2).replace("-", "−")].map((text) => make("td", text))));
  const table = make("table", null, {},
    make("thead", null, {}, make("tr", null, {}, ...head.map((text) => make("th", text, { scope: "col" })))),
    make("tbody", null, {}, ...rows));
  const { criterion } = index.summary;
  section.append(make("div", null, { class: "scroll" }, table), make("p",
    "The share of the specialised latent’s tokens on which the shared one fires too, and the same with the specialised one’s firings " +
    "taken from the sequence before: what densities alone give. Listed are pairs whose first share is larger beyond what chance would " +
    `give among all pairs (expected: ${criterion.chance}), of specialised latents that fire on at least ${criterion.count} tokens.`, { class: "note" }));
  return section;
}

function lens(strings, data) {
  const column = (title, pairs) => make("div", null, {}, make("h3", title),
    make("ol", null, { class: "tokens" }, ...pairs.map(([token, logit]) => make("li", null, {},
      make("bdi", strings[token], { class: "token" }), make("span", ` ${logit > 0 ? "+" : ""}${logit}`.replace("-", "−"), { class: "quiet" })))));
  return make("section", null, { class: "lens" }, column("Raises the logits of", data.up), column("Lowers the logits of", data.down));
}

function shownContext(strings, [sequence, position, peak, tokens, activations], highest, more = "") {
  const text = make("bdi", null, { dir: "auto" });
  tokens.forEach((token, i) => {
    const span = make("span", strings[token], { title: `activation ${activations[i]}` });
    if (activations[i] > 0) {
      span.className = i === peak ? "fires peak" : "fires";
      span.style.setProperty("--a", Math.min(1, activations[i] / highest).toFixed(3));
    }
    text.append(span);
  });
  return make("div", null, { class: "context" }, make("p", null, {}, text),
    make("p", `${activations[peak]} at position ${position} of sequence ${sequence.toLocaleString("en")}${more}`, { class: "where" }));
}

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("q").addEventListener("input", () => change({ q: $("q").value, page: null }));
$("level").addEventListener("change", () => change({ level: $("level").value, page: null }));
$("sort").addEventListener("change", () => change({ sort: $("sort").value === "id" ? null : $("sort").value, page: null }));
$("reverse").addEventListener("change", () => change({ desc: $("reverse").checked ? 1 : null, page: null }));
addEventListener("hashchange", () => { show(); if (state().has("latent")) $("latent").focus({ preventScroll: false }); });
show();
