// Asks the server once for each picture; every share of the slider is in its answer.
"use strict";

const $ = (id) => document.getElementById(id);
const UNREACHABLE = "The server does not answer. Is it still running?";
let about = null; // what is shown, see /about
let answers = null; // of the picture that was asked with last
let turn = 0; // of the request: a late answer to an earlier picture is dropped
let address = ""; // of the sent picture in this browser

const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const count = (number) => number.toLocaleString("en");
const share = () => Number($("slider").value);

function coloured(element, version) {
  const colour = about.colours[version];
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
  const light = 0.2126 * red ** 2.2 + 0.7152 * green ** 2.2 + 0.0722 * blue ** 2.2;
  element.style.setProperty("--version", colour);
  element.style.setProperty("--on", light > 0.18 ? "#1b1f24" : "#ffffff");
  return element;
}

const chip = (version, text = `v${version}`) =>
  coloured(make("span", { className: "chip", textContent: text }), version);

// Small pictures show their pixels; blurred ones would look better than what the network saw.
const tiny = new Set();
function picture(path, alt) {
  const image = make("img", { alt, decoding: "sync", src: `${path}?start=${about.start}` });
  const mark = () => image.classList.add("tiny");
  if (tiny.has(path)) mark();
  image.onload = () => {
    if (image.naturalWidth > 64) return;
    tiny.add(path);
    mark();
  };
  return image;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function ask(request, pressed) {
  const mine = ++turn;
  complain("");
  $("answers").setAttribute("aria-busy", "true");
  let response = null;
  let content = { error: UNREACHABLE };
  try {
    response = await request();
    content = await response.json();
  } catch {
    if (response) content = { error: `The server refused (${response.status}). Try another picture.` };
  }
  if (mine !== turn) return;
  $("answers").setAttribute("aria-busy", "false");
  if (content.error) {
    complain(content.error);
    $("error").scrollIntoView();
    return;
  }
  answers = content;
  for (const button of $("picks").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button === pressed));
  }
  show();
}

function shown(source, text) {
  $("asked").src = source;
  $("asked").hidden = false;
  $("asked-text").replaceChildren(text, text && make("br"), "Drop another, or ", make("u", { textContent: "choose one" }));
}

function send(file) {
  if (file.size > about.size) {
    complain(`${file.name} has more than ${about.size / 1e6} MB. Choose a smaller one.`);
    return;
  }
  const request = () =>
    fetch(`answers?name=${encodeURIComponent(file.name)}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
  ask(async () => {
    const response = await request();
    if (response.ok) {
      URL.revokeObjectURL(address);
      address = URL.createObjectURL(file);
      $("asked").alt = file.name;
      $("asked").classList.remove("tiny");
      shown(address, "");
    }
    return response;
  }, null);
}

function pick(number, button) {
  const label = about.picks[number];
  const image = button.querySelector("img");
  $("asked").alt = image.alt;
  $("asked").classList.toggle("tiny", image.naturalWidth <= 64);
  shown(image.src, label === null ? "" : `Class ${label}`);
  ask(() => fetch(`picks/${number}/answers`), button);
}

// What is shown of the answers

function show() {
  showShare();
  if (!answers) return;
  const place = share();
  const cut = about.cuts[place];
  const wanted = new Set([...$("who").querySelectorAll("input:checked")].map((box) => Number(box.value)));
  const strips = answers.answers.filter((one) => wanted.has(one.version)).map((one) => strip(one, place, cut));
  $("answers").replaceChildren(...strips.map((one) => one.element));
  $("says").textContent = strips.map((one) => one.says).join(" ");
  if (!strips.length) $("answers").textContent = "Choose a version that asks.";
}

function strip(one, place, cut) {
  const found = one.shares[place].map(([row, score]) => {
    const known = answers.rows[row];
    return { row, score, ...known, version: row < cut ? about.new : known.version };
  });
  const facts = [];
  if (answers.label !== null) {
    const right = found.filter((answer) => answer.label === answers.label).length;
    facts.push(`${right} of ${found.length} of the picture’s class`);
  }
  const renewed = found.filter((answer) => answer.version === about.new).length;
  facts.push(`${renewed} of ${found.length} rows of version ${about.new}`);
  const says = `Version ${one.version} asks: ${facts.join(", ")}.`;
  facts.push(`embedded in ${one.embed_ms.toFixed(1)} ms, searched in ${one.search_ms.toFixed(1)} ms`);
  const head = make("header", {},
    make("h3", { textContent: `Version ${one.version} asks` }),
    make("p", { className: "muted small", textContent: facts.join(" · ") }));
  const list = make("ol", {}, ...found.map(item));
  return { says, element: make("section", { className: "strip" }, head, list) };
}

function item(answer) {
  const right = answers.label !== null && answer.label === answers.label;
  const frame = make("div", { className: "frame" },
    picture(`rows/${answer.row}.png`, answer.label ?? answer.key), chip(answer.version));
  const name = answer.label ?? answer.key.split("/").pop();
  const label = make("span", { className: right ? "label same" : "label", textContent: right ? `✓ ${name}` : name });
  const score = make("span", { className: "score", textContent: answer.score.toFixed(3) });
  label.title = answer.key;
  return make("li", { className: "answer" }, coloured(frame, answer.version), make("p", {}, label, score));
}

function showShare() {
  const place = share();
  const rows = `${count(about.cuts[place])} of ${count(about.rows)} rows`;
  $("share").textContent = `${place} %`;
  $("share-text").textContent = `${rows} by version ${about.new}`;
  $("slider").setAttribute("aria-valuetext", `${place} percent, ${rows}`);
  if (!about.quality) return;
  $("here").setAttribute("x1", place);
  $("here").setAttribute("x2", place);
  const line = (kind, dashed) =>
    make("span", {},
      coloured(make("span", { className: dashed ? "key dashed" : "key" }), about[kind]),
      `version ${about[kind]} asks: ${percent(about.quality[kind][place])}`);
  $("quality").replaceChildren(
    "Right class first: ", line("new", false), line("old", true));
}

function drawQuality() {
  const { old: before, new: after, queries } = about.quality;
  const all = [...before, ...after];
  const high = Math.ceil(10 * Math.max(...all)) / 10;
  const low = Math.floor(10 * Math.min(...all)) / 10;
  const points = (values) =>
    values.map((value, at) => `${at},${(100 * (high - value)) / (high - low || 1)}`).join(" ");
  for (const [id, values, version] of [["old-line", before, about.old], ["new-line", after, about.new]]) {
    $(id).setAttribute("points", points(values));
    $(id).style.stroke = about.colours[version];
  }
  $("top").textContent = `${Math.round(100 * high)} %`;
  $("bottom").textContent = `${Math.round(100 * low)} %`;
  $("chart").hidden = $("quality").hidden = false;
  $("source").append(` The curves: ${count(queries)} of these rows ask, each but for itself.`);
}

// The page itself

function introduce() {
  document.title = $("title").textContent = about.title;
  const sampled = about.rows < about.total ? `${count(about.rows)} of ` : "";
  $("about").textContent =
    `${sampled}${count(about.total)} pictures of a gallery that comes from version ${about.old} of ${about.chain}. ` +
    "Any version may ask; a frame’s colour says which one embedded the row.";
  const now = Math.round((100 * about.renewed) / about.rows);
  $("source").textContent =
    "The slider changes no store: both versions’ features of each row were computed when this server started. " +
    `The store itself is at ${now} %.`;
  $("notes").textContent = [
    "Scores are cosines. Rows of the very same picture are left out of the answers. Every row is compared, in memory; " +
      "the times are this server’s, of one picture.",
    about.left_out ? `${count(about.left_out)} rows are left out: their pictures are gone or have changed.` : "",
  ].join(" ");
  $("slider").value = now;
  $("legend").replaceChildren("Rows embedded by ",
    ...Object.keys(about.colours).flatMap((version) => [chip(version, `version ${version}`), " "]));
  for (const version of about.asking) {
    const box = make("input", { type: "checkbox", value: version });
    box.checked = version === about.old || version === about.new;
    box.onchange = show;
    $("who").append(make("label", {}, box, String(version)));
  }
  $("who").hidden = about.asking.length < 2;
  if (about.quality) drawQuality();
  about.picks.forEach((label, number) => {
    const alt = label === null ? `picture ${number + 1}` : `picture ${number + 1}, class ${label}`;
    const button = make("button", { type: "button", title: alt }, picture(`picks/${number}.png`, alt));
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => pick(number, button);
    $("picks").append(make("li", {}, button));
  });
}

function listen() {
  $("slider").oninput = show;
  $("file").onchange = () => {
    if ($("file").files.length) send($("file").files[0]);
    $("file").value = "";
  };
  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => event.preventDefault()); // else the browser opens the file
  }
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(kind, () => $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover"));
  }
  document.addEventListener("drop", (event) => {
    if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
  });
}

async function begin() {
  try {
    about = await (await fetch("about")).json();
  } catch {
    complain(UNREACHABLE);
    return;
  }
  introduce();
  listen();
  document.querySelector("main").hidden = false;
  showShare();
  const first = $("picks").querySelector("button");
  if (first) pick(0, first);
  else $("answers").setAttribute("aria-busy", "false");
}

begin();
