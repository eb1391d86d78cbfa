// Translates while one types. Whatever comes from the server or the user is shown as text, never as markup.
"use strict";

const WAIT_MS = 250;       // after the last key
const TRIES_WHEN_BUSY = 5;
const MOST_CELLS = 80;     // tokens a side of the heat map

const $ = (id) => document.getElementById(id);
let described = null;      // what /api/models says
let timer = null;
let current = null;        // AbortController of the requests under way: their answers are the only ones shown

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);  // strings become text nodes
  return made;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is fairseq-interactive still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const problem = new Error(answer.error || `The server answers ${response.status}.`);
  problem.status = response.status;
  throw problem;
}

async function translate(request, signal) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await ask("api/translate", {
        method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(request),
      });
    } catch (error) {
      if (error.status !== 503 || attempt === TRIES_WHEN_BUSY) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
      signal.throwIfAborted();
    }
  }
}

function number(id) {
  const input = $(id);
  return input.value !== "" && input.validity.valid ? input.valueAsNumber : Number(input.defaultValue);
}

function chosenModels() {
  const names = [$("model").value];
  if ($("beside").value && $("beside").value !== names[0]) names.push($("beside").value);
  return names;
}

async function update() {
  if (current) current.abort();
  const mine = current = new AbortController();
  keepState();
  const text = $("text").value.replace(/\n+$/, "");
  if (!text.trim()) {
    show([]);
    return say("", "");
  }
  const beam = number("beam");
  const common = { text, beam, nbest: Math.min(number("nbest"), beam), lenpen: number("lenpen"), attention: true };
  $("results").classList.add("waiting");
  const answers = await Promise.allSettled(chosenModels().map((model) => translate({ ...common, model }, mine.signal)));
  if (mine !== current) return;  // something else was typed meanwhile
  $("results").classList.remove("waiting");
  const failed = answers.find((answer) => answer.status === "rejected");
  show(answers.filter((answer) => answer.status === "fulfilled").map((answer) => answer.value));
  if (failed) say(failed.reason.message, "");
  else say("", answers.map((a) => a.value.translations.map((t) => t.hypotheses[0].text).join(" ")).join("; "));
}

function say(problem, spoken) {
  $("problem").textContent = problem;
  $("status").textContent = spoken;
}

function show(answers) {
  $("results").classList.toggle("two", answers.length === 2);
  $("results").replaceChildren(...answers.map(panel));
  $("legend").hidden = !answers.length;
}

function panel(answer, place) {
  const about = described.models.find((model) => model.name === answer.model);
  const map = element("div");
  const several = answer.translations.length > 1;
  const box = element("section", { class: "model", "aria-label": answer.model },
    element("h2", {}, answer.model),
    element("p", { class: "about" }, `${describe(about)}, ${answer.seconds.toFixed(2)} s`));
  let first = true;
  for (const translation of answer.translations) {
    if (!translation.source.trim()) continue;
    if (several) box.append(element("p", { class: "source", dir: "auto", lang: about.source_lang }, translation.source));
    const list = element("ol", { "aria-label": "Translations, best first" });
    for (const hypothesis of translation.hypotheses) {
      const radio = element("input", { type: "radio", name: `shown-${place}`, checked: first && "" });
      radio.addEventListener("change", () => map.replaceChildren(...heatMap(translation, hypothesis, about)));
      list.append(element("li", {}, element("label", {}, radio,
        element("span", { class: "translation", dir: "auto", lang: about.target_lang }, hypothesis.text),
        element("span", { class: "score" }, hypothesis.score.toFixed(3)))));
      if (first) map.replaceChildren(...heatMap(translation, hypothesis, about));
      first = false;
    }
    box.append(list);
    if (translation.unknown.length) {
      box.append(element("p", { class: "note" }, `Not in the dictionary: ${translation.unknown.join(" ")}`));
    }
  }
  box.append(map);
  return box;
}

function describe(model) {
  if (model.backend === "ctranslate2") return `CTranslate2, computed in ${model.compute_type}`;
  const rule = { "default": model.pre_norm ? "Pre-LN" : "Post-LN" }[model.init_type] || model.init_type;
  const size = model.parameters >= 1e6 ? `${(model.parameters / 1e6).toFixed(1)} M` : `${Math.ceil(model.parameters / 1e3)} k`;
  const ensemble = model.ensemble_size > 1 ? `ensemble of ${model.ensemble_size}, ` : "";
  return `${ensemble}${rule}, ${model.encoder_layers}+${model.decoder_layers} layers, ${size} parameters`;
}

function heatMap(translation, hypothesis, about) {
  const heading = element("h3", {}, "Attention");
  if (!hypothesis.attention) return [heading, element("p", { class: "note" }, "Too long to show.")];
  const sources = translation.source_tokens.slice(0, MOST_CELLS);
  const rows = hypothesis.tokens.slice(0, MOST_CELLS).map((token, at) => [token, hypothesis.attention[at]]);
  const heads = sources.map((token) => element("th", { scope: "col", title: token },
    element("span", { dir: "auto", lang: about.source_lang }, token)));
  const body = element("tbody");
  for (const [token, weights] of rows) {
    const row = element("tr", {}, element("th", { scope: "row", title: token, dir: "auto", lang: about.target_lang }, token));
    sources.forEach((source, at) => {
      const said = `${token} ← ${source}: ${weights[at].toFixed(2)}`;
      const cell = element("td", { title: said }, element("span", { class: "hidden-visually" }, weights[at].toFixed(2)));
      cell.style.setProperty("--weight", weights[at]);
      cell.addEventListener("mouseenter", () => heads[at].classList.add("lit"));
      cell.addEventListener("mouseleave", () => heads[at].classList.remove("lit"));
      row.append(cell);
    });
    body.append(row);
  }
  const table = element("table", {},
    element("caption", { class: "hidden-visually" }, "How much each token of the translation (row) attends to each source token (column)"),
    element("thead", {}, element("tr", {}, element("td"), ...heads)), body);
  const cut = translation.source_tokens.length > MOST_CELLS || hypothesis.tokens.length > MOST_CELLS;
  const scale = element("p", { class: "scale" }, "0", element("i"), "1",
    cut ? `; the first ${MOST_CELLS} tokens` : "");
  return [heading, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Attention" }, table), scale];
}

function keepState() {
  const state = new URLSearchParams();
  for (const id of ["text", "model", "beside", "beam", "nbest", "lenpen"]) if ($(id).value) state.set(id, $(id).value);
  history.replaceState(null, "", "#" + state);
}

function restoreState() {
  for (const [id, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = ["text", "model", "beside", "beam", "nbest", "lenpen"].includes(id) && $(id);
    if (field && (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value))) field.value = value;
  }
}

async function start() {
  try {
    described = await ask("api/models");
  } catch (error) {
    return say(error.message, "");
  }
  const { models, defaults, limits } = described;
  for (const { name } of models) $("model").append(element("option", { value: name }, name));
  $("beside").append(element("option", { value: "" }, "nothing"), ...models.map(({ name }) => element("option", { value: name }, name)));
  $("model-field").hidden = $("beside-field").hidden = models.length < 2;
  $("languages").textContent = `${models[0].source_lang} → ${models[0].target_lang}`;
  $("text").lang = models[0].source_lang;
  $("text").maxLength = limits.characters;
  for (const [id, value] of Object.entries(defaults)) $(id).defaultValue = value;
  $("nbest").defaultValue = Math.max(defaults.nbest, Math.min(3, defaults.beam));
  $("beam").max = $("nbest").max = limits.beam;
  restoreState();
  $("form").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(update, WAIT_MS);
  });
  $("form").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => { restoreState(); update(); });
  update();
}

start();
