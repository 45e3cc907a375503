"use strict";
const SEPARATOR = "\u241e", MOST_FILE_BYTES = 64 << 20, THEMES = ["auto", "light", "dark"];
const BLOCKS = "address,article,aside,blockquote,br,dd,div,dl,dt,figcaption,footer,h1,h2,h3,h4,h5,h6,header,hr,li,main," +
  "nav,ol,p,pre,section,table,tr,ul";
const at = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString();
const withoutSeparator = (text) => text.replaceAll(SEPARATOR, "");
let model = null, running = null;

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function makeButton(text, onClick, className = "quiet") {
  const button = make("button", className, text);
  button.type = "button";
  button.addEventListener("click", onClick);
  return button;
}

/* Documents: { name, text }, in the order in which the model reads them. */

let documents = [], selected = 0;

const ownName = () => {
  const taken = new Set(documents.map((each) => each.name));
  for (let number = 1; ; number += 1) if (!taken.has(`Text ${number}`)) return `Text ${number}`;
};

/** What the model reads: one text as it is, several with their names above them. */
function contextText() {
  const full = documents.filter((each) => each.text.trim());
  if (full.length < 2) return withoutSeparator(full[0]?.text ?? "");
  return withoutSeparator(full.map((each) => `# ${each.name}\n\n${each.text.trim()}`).join("\n\n"));
}

function select(index) {
  selected = Math.max(0, Math.min(index, documents.length - 1));
  at("document").value = documents[selected]?.text ?? "";
  listDocuments();
}

function addDocument(name, text) {
  documents = documents.filter((each) => each.text.trim());
  documents.push({name, text});
  select(documents.length - 1);
}

function removeDocument(index) {
  documents.splice(index, 1);
  select(selected > index ? selected - 1 : selected);
}

function moveDocument(index, by) {
  [documents[index], documents[index + by]] = [documents[index + by], documents[index]];
  if (selected === index) selected += by;
  else if (selected === index + by) selected -= by;
  listDocuments();
}

function editDocument() {
  if (!documents.length) documents.push({name: ownName(), text: ""});
  documents[selected].text = at("document").value;
  listDocuments();
}

function documentItem({name, text}, index) {
  const item = make("li"), isSelected = index === selected;
  const names = makeButton(name, () => select(index), "name");
  if (isSelected) names.setAttribute("aria-current", "true");
  item.append(names, make("span", "muted", count(text.length)));
  for (const [sign, what, isOff, act] of [
    ["↑", "Move up", index === 0, () => moveDocument(index, -1)],
    ["↓", "Move down", index === documents.length - 1, () => moveDocument(index, 1)],
    ["✕", "Remove", false, () => removeDocument(index)],
  ]) {
    const button = item.appendChild(makeButton(sign, act, ""));
    button.setAttribute("aria-label", `${what}: ${name}`);
    button.disabled = isOff;
  }
  return item;
}

function listDocuments() {
  at("list").replaceChildren(...documents.map(documentItem));
  const characters = documents.reduce((sum, each) => sum + each.text.length, 0);
  at("size").textContent = characters ? `${count(characters)} characters` : "";
}

/** HTML without its styles: they would be blocked as the page's own, and the console would say so. */
function withoutStyles(source) {
  return source.replace(/<style[\s>][\s\S]*?<\/style\s*>/gi, "")
    .replace(/<[a-z][^>]*>/gi, (tag) => tag.replace(/\sstyle\s*=\s*("[^"]*"|'[^']*')/gi, ""));
}

/** The text of an HTML page: its body without scripts, a line for each block. Nothing of it is loaded or run. */
function htmlText(source) {
  const page = new DOMParser().parseFromString(withoutStyles(source), "text/html");
  for (const element of page.querySelectorAll("script,style,noscript,template,svg,iframe")) element.remove();
  for (const element of page.body.querySelectorAll(BLOCKS)) {
    element.before("\n");
    element.after("\n");
  }
  return page.body.textContent.replace(/[ \t\u00a0]+/g, " ").replace(/ ?\n ?/g, "\n").replace(/\n{3,}/g, "\n\n").trim();
}

/** Characters of a text file in UTF-8, or in UTF-16 that says so; null where it is none. */
function decoded(bytes) {
  const encoding = {0xfffe: "utf-16le", 0xfeff: "utf-16be"}[bytes[0] << 8 | bytes[1]] ?? "utf-8";
  try {
    const text = new TextDecoder(encoding, {fatal: true}).decode(bytes);
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

/** The text of a PDF, which the server reads. */
async function textOfServer(file) {
  const form = new FormData();
  form.append("file", file);
  const response = await fetch("v1/documents", {method: "POST", headers: keyHeader(), body: form});
  const body = await response.json();
  if (!response.ok) throw new Error(`${file.name}: ${body.message}`);
  return body.text;
}

async function textOf(file) {
  if (file.size > MOST_FILE_BYTES) throw new Error(`${file.name} has more than ${MOST_FILE_BYTES >> 20} MB.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (/\.pdf$/i.test(file.name) || String.fromCharCode(...bytes.subarray(0, 5)) === "%PDF-")
    return textOfServer(file);
  const text = decoded(bytes);
  if (text === null) throw new Error(`${file.name} is no plain text in UTF-8.`);
  return /\.x?html?$/i.test(file.name) ? htmlText(text) : text;
}

async function openFiles(files) {
  const complaints = [];
  for (const file of files) {
    try {
      addDocument(file.name, await textOf(file));
    } catch (error) {
      complaints.push(error.message);
    }
  }
  at("file-error").textContent = complaints.join(" ");
}

/* The conversation: what was asked about one context. */

let told = {context: null, turns: []};

function forget() {
  told = {context: contextText(), turns: []};
  at("turns").replaceChildren();
  at("map").hidden = true;
  at("forget").disabled = true;
}

/** Questions and answers as messages; the context and the separator stand before the first question. */
function messages(turns) {
  return turns.flatMap(({question, answer}, index) => {
    const before = index === 0 && told.context ? `${told.context}\n\n${SEPARATOR}` : "";
    const asked = {role: "user", content: before + question};
    return answer ? [asked, {role: "assistant", content: withoutSeparator(answer)}] : [asked];
  });
}

function bodyOf(turn, isContinued) {
  const mode = at("mode").value, temperature = Number(at("temperature").value);
  return {
    model: model.id, stream: true, stream_options: {include_usage: true},
    temperature: turn.isRetry ? Math.max(temperature, 0.7) : temperature,
    max_completion_tokens: Number(at("tokens").value),
    messages: messages([...told.turns.slice(0, turn.index), turn]),
    ...(isContinued ? {continue_final_message: true, add_generation_prompt: false} : {}),
    star: {
      ...(told.context ? {separator: SEPARATOR} : {}), ...(mode ? {mode} : {}),
      ...(told.context && at("looks").checked ? {attention_map: true} : {}),
    },
  };
}

/* Asking. */

const keyHeader = () => (at("key").value ? {Authorization: "Bearer " + at("key").value} : {});
const headers = () => ({"Content-Type": "application/json", ...keyHeader()});

async function findModel() {
  const response = await fetch("v1/models", {headers: headers()});
  const body = await response.json();
  if (!response.ok) throw new Error(body.message);
  model = body.data[0];
  at("model").textContent = `${model.id}, up to ${count(model.max_model_len)} tokens`;
}

function showStage(stage, value, max) {
  at("progress").hidden = !stage;
  at("stage").textContent = stage ?? "";
  const bar = document.querySelector("progress");
  if (max) { bar.max = max; bar.value = value; } else { bar.removeAttribute("value"); }
}

function onLine(line, turn) {
  const encoded = line.match(/^: encoded (\d+) of (\d+)/);
  if (encoded) showStage(`Encoding: ${count(+encoded[1])} of ${count(+encoded[2])} tokens`, +encoded[1], +encoded[2]);
  if (line === "data: [DONE]") turn.isWhole = true;
  if (!line.startsWith("data: ") || turn.isWhole) return;
  const data = JSON.parse(line.slice(6));
  if (data.error) throw new Error(data.error.message);
  const choice = data.choices[0];
  if (choice?.delta?.content) {
    turn.answer += choice.delta.content;
    turn.shown.answer.textContent = turn.answer;
    showStage("Answering");
  }
  turn.isCut ||= choice?.finish_reason === "length";
  turn.usage = data.usage ?? turn.usage;
}

async function read(response, turn) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) onLine(line, turn);
  }
  if (!turn.isWhole) throw new Error("The answer broke off: the server is gone, or the connection.");
}

async function fill(turn, isContinued = false) {
  running = new AbortController();
  Object.assign(turn, {isWhole: false, isCut: false, usage: null, error: "", limit: at("tokens").value});
  if (!isContinued) turn.answer = "";
  showTurn(turn);
  setBusy(true);
  showStage("Sending");
  try {
    if (!model) await findModel();
    const body = JSON.stringify(bodyOf(turn, isContinued));
    const response = await fetch("v1/chat/completions", {method: "POST", headers: headers(), body, signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).message);
    await read(response, turn);
  } catch (error) {
    turn.error = error.name === "AbortError" ? "Stopped." : error.message;
  }
  showStage(null);
  running = null;
  setBusy(false);
  showTurn(turn);
  if (turn.usage?.star?.attention_map) showMap(turn);
}

function setBusy(isBusy) {
  at("ask").disabled = isBusy;
  at("stop").disabled = !isBusy;
  at("forget").disabled = isBusy || !told.turns.length;
}

async function ask(question) {
  if (contextText() !== told.context) forget();
  const last = told.turns.at(-1);
  if (last && !last.answer) told.turns.pop();  // it failed: the model has not seen it
  const turn = {question, answer: "", index: told.turns.length, shown: newTurn(question)};
  told.turns.push(turn);
  await fill(turn);
}

/* Turns as they are shown. */

function newTurn(question) {
  const element = at("turns").appendChild(make("article", "turn"));
  const shown = {element, answer: make("p", "answer"), after: make("div")};
  element.append(make("p", "question", question), shown.answer, shown.after);
  element.scrollIntoView({block: "nearest"});
  return shown;
}

/** What is below an answer: what cut it off, what it took, and what can be done with it. */
function showTurn(turn) {
  const {shown, usage} = turn, parts = [];
  shown.answer.textContent = turn.answer;
  if (turn.isCut) parts.push(make("p", "cut", `Cut at ${turn.limit} tokens.`));
  if (turn.error) parts.push(make("p", "error", turn.error));
  if (usage) parts.push(make("p", "stats", statsOf(usage)));
  if (!running || turn.isWhole || turn.error) parts.push(actionsOf(turn));
  shown.after.replaceChildren(...parts);
}

function statsOf({star, completion_tokens: generated}) {
  const {block_size: block, anchor_size: anchor, passed_keys: passed} = star.sizes;
  const sizes = block ? `, ${star.blocks} ${star.blocks === 1 ? "block" : "blocks"} of ${count(block)}, anchor ${count(anchor)}` +
    (passed ? `, ${count(passed)} passed keys` : "") : "";
  const encoding = star.cache_hit ? "found encoded" :
    `encoded in ${star.encode_seconds.toFixed(1)} s` + (star.cached_tokens ? `, ${count(star.cached_tokens)} tokens found` : "");
  return (star.context_tokens ? `Context: ${count(star.context_tokens)} tokens (${star.mode}${sizes}), ${encoding}. ` : "") +
    `First token after ${star.ttft_seconds.toFixed(2)} s, then ${(1000 * star.tpot_seconds).toFixed(0)} ms a token; ` +
    `${count(generated)} tokens.`;
}

function actionsOf(turn) {
  const actions = make("div", "actions"), isLast = turn === told.turns.at(-1);
  if (turn.answer) {
    const button = actions.appendChild(makeButton("Copy", () => copy(turn, button)));
  }
  if (turn.isCut && isLast) actions.append(makeButton("Continue", () => again(turn, true)));
  if (isLast) actions.append(makeButton("Regenerate", () => again(turn, false)));
  if (turn.usage?.star?.attention_map) actions.append(makeButton("Where it looked", () => showMap(turn)));
  return actions;
}

/** Ask for the last answer once more, or for what follows it. */
function again(turn, isContinued) {
  if (running || turn !== told.turns.at(-1)) return;
  turn.isRetry ||= !isContinued;
  fill(turn, isContinued);
}

async function copy(turn, button) {
  try {
    await navigator.clipboard.writeText(turn.answer);
  } catch {  // it is there on localhost and over https only
    getSelection().selectAllChildren(turn.shown.answer);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/* The map: where the answer looked in its context. */

let looked = {pieces: [], chosen: 0};

/** A piece of the context; `heat` is its peak over the highest. The first token takes much, whatever it is. */
function piecesOf({attention_map: map, attention_texts: texts}) {
  const pieces = map.map(([start, end, mass, peak], index) => ({start, end, mass, peak, text: texts[index]}));
  const rest = pieces.length > 1 ? pieces.slice(1) : pieces;
  const highest = Math.max(...rest.map((piece) => piece.peak), 1e-9);
  for (const piece of rest) piece.heat = piece.peak / highest;
  return rest;
}

function showMap(turn) {
  const star = turn.usage.star, pieces = piecesOf(star);
  const byHeat = [...pieces.keys()].sort((one, other) => pieces[other].heat - pieces[one].heat);
  looked = {pieces, chosen: byHeat[0]};
  at("map").hidden = !pieces.length;
  if (!pieces.length) return;
  at("map-of").textContent = `“${turn.question.slice(0, 60)}”`;
  at("strip").replaceChildren(...pieces.map(bar));
  at("strip").setAttribute("aria-valuemax", pieces.length);
  at("most").replaceChildren(...byHeat.slice(0, 3).map((index) => {
    const item = make("li");
    item.append(makeButton(pieces[index].text.trim() || "(white space)", () => choose(index)));
    return item;
  }));
  choose(byHeat[0]);
}

function bar(piece) {
  const element = make("i", piece.heat > 0.5 ? "hot" : "");
  element.style.setProperty("--heat", piece.heat);
  element.style.flexGrow = Math.sqrt(piece.end - piece.start);
  return element;
}

function choose(index) {
  const {pieces} = looked, strip = at("strip");
  index = Math.max(0, Math.min(index, pieces.length - 1));
  strip.children[looked.chosen]?.classList.remove("chosen");
  strip.children[index].classList.add("chosen");
  looked.chosen = index;
  const {start, end, heat, text} = pieces[index];
  strip.setAttribute("aria-valuenow", index + 1);
  strip.setAttribute("aria-valuetext", `Tokens ${start} to ${end - 1}, ${Math.round(100 * heat)} percent of the most: ${text}`);
  showPassage(index);
}

/** The text of a piece between that of its neighbours, and the name of its document where there are several. */
function showPassage(index) {
  const {pieces} = looked, {start, end, heat, text} = pieces[index];
  const source = documents.length > 1 && documents.find((each) => each.text.includes(text.trim()))?.name;
  const label = `${source ? source + ", " : ""}tokens ${count(start)} to ${count(end - 1)}, ${Math.round(100 * heat)} % of the most\n`;
  at("passage").replaceChildren(make("span", "muted", label),
    pieces[index - 1]?.text.slice(-240) ?? "", make("mark", "", text), pieces[index + 1]?.text.slice(0, 240) ?? "");
}

/* What a person does. */

function setTheme(name) {
  const isDark = name === "dark" || (name === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  at("theme").textContent = `Theme: ${name}`;
  at("theme").dataset.theme = name;
}

function nextTheme() {
  const name = THEMES[(THEMES.indexOf(at("theme").dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("theme", name);
  setTheme(name);
}

function listenToTheme() {
  const saved = localStorage.getItem("theme");
  setTheme(THEMES.includes(saved) ? saved : "auto");
  at("theme").addEventListener("click", nextTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(at("theme").dataset.theme));
}

function listenToDocuments() {
  at("document").addEventListener("input", editDocument);
  at("write").addEventListener("click", () => { addDocument(ownName(), ""); at("document").focus(); });
  at("files").addEventListener("change", async () => { await openFiles([...at("files").files]); at("files").value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    at("documents").addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;  // a text that is dragged goes where it is dropped
      event.preventDefault();
      at("documents").classList.toggle("over", name === "dragover");
      if (name === "drop") openFiles([...event.dataTransfer.files]);
    });
  }
}

function listenToQuestions() {
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = withoutSeparator(at("question").value.trim());
    if (!question || running) return;
    at("question").value = "";
    ask(question);
  });
  at("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    at("form").requestSubmit();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("forget").addEventListener("click", forget);
}

function listenToMap() {
  const strip = at("strip");
  const indexAt = (event) => [...strip.children].indexOf(event.target);
  for (const name of ["pointermove", "click"])
    strip.addEventListener(name, (event) => { if (indexAt(event) >= 0) choose(indexAt(event)); });
  strip.addEventListener("keydown", (event) => {
    const to = {ArrowRight: looked.chosen + 1, ArrowUp: looked.chosen + 1, ArrowLeft: looked.chosen - 1,
      ArrowDown: looked.chosen - 1, Home: 0, End: looked.pieces.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(to);
  });
}

listenToTheme();
listenToDocuments();
listenToQuestions();
listenToMap();
findModel().catch((error) => { at("model").textContent = error.message; });
