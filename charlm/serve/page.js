"use strict";
// The live page. All text of models, files and answers enters it as text, never as HTML.
const $ = (id) => document.getElementById(id);
const MOST_STEPS = 200; // of gradient descent on the coin
const SMALL = 1e-6; // bits of KL where it ends
const POLL = 5000; // milliseconds between two looks at the files
const UNKNOWN = { className: "cell unknown", title: "not in the model's vocabulary" };
let models = []; // as the server describes them
let most = 5000; // characters of a text

// An element with these properties or null; a child that is a string becomes text.
function make(tag, properties, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}
// A number may be the text "NaN" or "Infinity", which JSON does not have.
const shown = (value, digits = 2) => Number(value).toFixed(digits).replace(/^-(?=[0.]+$)/, "").replace("Infinity", "∞");
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const say = (sentence) => ($("error").textContent = sentence);

// Calls of the result run `work` one after the other; those during a run are one. It says an error of `work`.
function latest(work) {
  let running = false, again = false;
  return async () => {
    again = true;
    if (running) return;
    running = true;
    try {
      while (again) {
        again = false;
        await work();
      }
    } catch (error) {
      say(error.message);
    } finally {
      running = false;
    }
  };
}

// The answer of the server; an Error with its sentence if it refuses. Where the rate is limited it waits.
async function ask(path, values, signal) {
  const options = values && { method: "POST", body: JSON.stringify(values), signal };
  for (;;) {
    const answer = await fetch(path, options).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer: it may have been stopped.");
    });
    if (answer.ok) return answer;
    if (answer.status !== 429) throw new Error((await answer.json().catch(() => ({}))).error || `status ${answer.status}`);
    await pause(1000);
  }
}

// ---- models

const look = latest(async () => {
  const answer = await (await ask("models")).json();
  const before = models.map((model) => model.version).join();
  models = answer.models;
  most = answer.most;
  $("models").replaceChildren(
    ...models.map((model) => {
      const loss = model.bits === null ? "" : `, ${shown(model.bits, 3)} bits per character on dev`;
      const size = model.parameters ? `${model.parameters.toLocaleString("en")} parameters, ` : "";
      return make("li", null, `${model.name}: ${model.label}, ${size}step ${model.step.toLocaleString("en")}${loss}`);
    }),
  );
  const notice = models.map((model) => model.notice).filter((text) => text).join(" ");
  if ($("notice").textContent !== notice) $("notice").textContent = notice;
  if (before === models.map((model) => model.version).join()) return;
  const lines = models.some((model) => model.format === "line");
  $("hint").textContent = `${lines ? "For a model of items each line is an item, and a newline is its end. " : ""}At most ${most.toLocaleString("en")} characters; charlm score takes a file of any size.`;
  $("top-k").max = Math.min(100, Math.max(...models.map((model) => model.tokens)));
  if (!before) {
    $("top-k").value = $("top-k").max;
    build();
  }
  outputs();
  done = nothing();
  await update();
});

// A panel for each model in "Type" and in "Sample".
function build() {
  const title = (model) => (models.length > 1 ? [make("h3", null, model.name)] : []);
  $("scores").replaceChildren(
    ...models.map((model, index) => {
      const cells = make("div", { className: "cells", id: `cells-${index}`, role: "img" });
      const caption = make("caption", { className: "faint" }, "The next character", make("span"));
      const table = make("table", null, caption, make("tbody", { id: `next-${index}` }));
      return make("div", null, ...title(model), cells, make("p", { id: `total-${index}` }), table);
    }),
  );
  $("samples").replaceChildren(
    ...models.map((model, index) =>
      make("div", null, ...title(model), make("ol", { id: `samples-${index}`, className: model.format })),
    ),
  );
  $("compared").hidden = models.length < 2;
}

// ---- typing

const nothing = () => ({ chars: [], bits: models.map(() => []), bases: "", next: null });
let done = nothing(); // what has been scored: a beginning of the text

const update = latest(async () => {
  while (models.length) {
    const text = $("text").value;
    const chars = Array.from(text);
    let start = 0;
    while (start < done.chars.length && done.chars[start] === chars[start]) start++;
    if (done.next && start === chars.length && start === done.chars.length) break;
    if (chars.length > most) throw new Error(tooLong(chars.length));
    const answer = await (await ask("score", { text, start })).json();
    const bases = answer.models.map((model) => model.basis).join();
    if (start && bases !== done.bases) {
      done = nothing(); // another model, or other codes: the numbers do not fit together
      continue;
    }
    const stop = start + answer.models[0].bits.length;
    done.chars = chars.slice(0, stop);
    done.bases = bases;
    done.next = stop === chars.length;
    answer.models.forEach((model, index) => {
      model.bits = model.bits.map(Number);
      done.bits[index].splice(start, Infinity, ...model.bits);
      show(index, start, model);
    });
    if (models.length > 1) compare(start, answer.models);
    if ($("error").textContent) say("");
  }
  announce();
});

const sum = (bits) => bits.reduce((total, each) => total + each, 0);
const tooLong = (length) =>
  `The text has ${length.toLocaleString("en")} characters, and this page takes ${most.toLocaleString("en")}: charlm score DIR -i FILE takes a file of any size.`;

function cell(name, text, colour, properties) {
  const usual = { className: "cell", style: `background-color: ${colour}` };
  const found = make("span", { ...usual, ...properties }, name, make("small", null, text));
  return name === "↵" ? make("span", null, found, make("br")) : found;
}

// Replaces the cells from `start` on; a child of the parent is a character.
function replace(parent, start, cells) {
  while (parent.childNodes.length > start) parent.lastChild.remove();
  parent.append(...cells);
}

function show(index, start, model) {
  const full = Math.max(1, Math.log2(models[index].tokens)); // bits that are red: a guess among all tokens
  const hue = (bits) => 120 * (1 - Math.min(1, Math.max(0, (Number.isNaN(bits) ? full : bits) / full)));
  const cells = model.bits.map((bits, at) => {
    const properties = model.unknown.includes(at) ? UNKNOWN : {};
    return cell(model.names[at], shown(bits, 1), `hsl(${hue(bits)} 83.9% 68.9%)`, properties);
  });
  replace($(`cells-${index}`), start, cells);
  const bits = done.bits[index];
  const worst = bits.map((each, at) => `${done.chars[at]} ${shown(each, 1)}`).slice(-40).join(", ");
  $(`cells-${index}`).ariaLabel = `Bits of the last characters: ${worst || "none"}`;
  const total = sum(bits);
  $(`total-${index}`).textContent = bits.length ? `${shown(total)} bits, ${shown(total / bits.length, 3)} bits per character` : "";
  if (!model.next) return;
  const rows = model.next.top.map(([name, p]) => {
    const bar = make("div", { style: `width: ${100 * (Number(p) || 0)}%` });
    const head = make("th", { scope: "row" }, make("bdi", null, name));
    return make("tr", null, head, make("td", null, `${shown(100 * p, 1)} %`), make("td", { className: "bar" }, bar));
  });
  $(`next-${index}`).replaceChildren(...rows);
  const others = model.next.others ? `, ${model.next.others.toLocaleString("en")} others not shown` : "";
  $(`next-${index}`).parentNode.caption.lastChild.textContent = `: entropy ${shown(model.next.entropy)} bits${others}`;
}

function compare(start, answers) {
  const full = Math.max(...models.map((model) => Math.log2(model.tokens)));
  const cells = answers[0].names.map((name, at) => {
    const [one, other] = answers.map((model) => model.bits[at]);
    const more = other - one;
    const share = Math.min(1, Math.abs(more || 0) / full);
    return cell(name, `${more > 0 ? "+" : ""}${shown(more, 1)}`, `hsl(${more > 0 ? "212 90%" : "25 95%"} ${95 - 35 * share}%)`);
  });
  replace($("difference"), start, cells);
  const rows = models.map((model, index) => {
    const total = sum(done.bits[index]);
    const mean = done.chars.length ? shown(total / done.chars.length, 3) : "–";
    const name = make("th", { scope: "row" }, model.name);
    return make("tr", null, name, make("td", null, shown(total)), make("td", null, mean));
  });
  $("compared").querySelector("tbody").replaceChildren(...rows);
}

// What a screen reader says when the typing rests.
let resting = 0;
function announce() {
  clearTimeout(resting);
  resting = setTimeout(() => {
    const parts = models.map((model, index) => {
      const best = $(`next-${index}`).querySelector("tr");
      const name = models.length > 1 ? `${model.name}: ` : "";
      return `${name}${$(`total-${index}`).textContent || "no text"}; the most probable next character: ${best ? best.innerText : ""}`;
    });
    $("summary").textContent = parts.join(". ");
  }, 700);
}

// A paste that is too long would be cut or make the browser slow: it is refused with a sentence.
function check(event, data) {
  const inserted = data ? data.getData("text") : "";
  const area = $("text");
  const length = area.value.length - (area.selectionEnd - area.selectionStart) + inserted.length;
  if (length <= most || Array.from(area.value).length + Array.from(inserted.slice(0, 2 * most + 1)).length <= most) return;
  event.preventDefault();
  say(tooLong(length));
}
$("text").addEventListener("paste", (event) => check(event, event.clipboardData));
$("text").addEventListener("drop", (event) => check(event, event.dataTransfer));
$("text").addEventListener("input", update);

// ---- samples

const off = () => $("top-k").value === $("top-k").max;
function outputs() {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
  $("top-k-value").textContent = off() ? "all" : $("top-k").value;
  $("top-p-value").textContent = Number($("top-p").value).toFixed(2);
}
for (const id of ["temperature", "top-k", "top-p"]) $(id).addEventListener("input", outputs);

let running = null;
$("stop").addEventListener("click", () => running && running.abort());
$("sampler").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) running.abort();
  const own = (running = new AbortController());
  const seed = Math.floor(Math.random() * 2 ** 31);
  const values = {
    prompt: $("prompt").value,
    temperature: Number($("temperature").value),
    top_k: off() ? null : Number($("top-k").value),
    top_p: Number($("top-p").value),
    seed,
  };
  $("stop").disabled = false;
  $("sampling").textContent = `Sampling with seed ${seed} …`;
  const results = await Promise.all(models.map((_, index) => stream(index, values, own.signal)));
  if (running !== own) return;
  running = null;
  $("stop").disabled = true;
  $("sampling").textContent = own.signal.aborted ? "Stopped." : results.includes(false) ? "" : `Done, with seed ${seed}.`;
});

// Shows the samples of a model as they arrive; false after an error, which it shows in their place.
async function stream(index, values, signal) {
  const list = $(`samples-${index}`);
  list.replaceChildren();
  try {
    const answer = await ask("sample", { ...values, model: index }, signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done: ended, value } = await reader.read();
      if (ended) return true;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const { number, text, error } of lines.map((line) => JSON.parse(line))) {
        if (error) throw new Error(error);
        while (list.children.length <= number) list.append(make("li", null, make("bdi")));
        list.children[number].firstChild.textContent += text;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") list.replaceChildren(make("li", null, error.message));
    return false;
  }
}

// ---- coin

const WIDTH = 284, HEIGHT = 154, BITS = 4; // of the picture, and the bits of its height
const x = (q) => 30 + WIDTH * q;
const y = (bits) => 160 - (HEIGHT * Math.min(bits, BITS)) / BITS;
let q = 0.3; // the slider has two digits only
let descent = 0; // the number of the last press of "Minimise"

async function toss() {
  const p = Number($("p").value);
  const found = await (await ask("coin", { p, q })).json();
  for (const name of ["entropy", "kl", "cross_entropy"]) $(name.replace("_", "-")).textContent = `${shown(found[name], 4)} bits`;
  $("gradient").textContent = shown(found.gradient, 4);
  $("p-value").textContent = p.toFixed(2);
  $("q-value").textContent = q.toFixed(q === Number(q.toFixed(2)) ? 2 : 4);
  const points = Array.from({ length: 99 }, (_, index) => (index + 1) / 100);
  const loss = (each) => -p * Math.log2(each) - (1 - p) * Math.log2(1 - each);
  $("line").setAttribute("d", `M${points.map((each) => `${x(each).toFixed(1)} ${y(loss(each)).toFixed(1)}`).join("L")}`);
  $("floor").setAttribute("d", `M30 ${y(found.entropy)}H314`);
  $("dot").setAttribute("cx", x(q));
  $("dot").setAttribute("cy", y(found.cross_entropy));
  $("curve").setAttribute("aria-label", `Cross-entropy ${shown(found.cross_entropy)} bits at Q ${q.toFixed(2)}; the least is ${shown(found.entropy)} at Q ${p}`);
  return found;
}

const moved = latest(toss);
for (const id of ["p", "q"])
  $(id).addEventListener("input", () => {
    descent++;
    if (id === "q") q = Number($("q").value);
    $("steps").textContent = "";
    moved();
  });

const minimise = latest(async () => {
  const own = descent;
  for (let step = 0; step <= MOST_STEPS; step++) {
    const found = await toss();
    if (own !== descent) return;
    const end = found.kl < SMALL ? ": done." : step === MOST_STEPS ? ": stopped." : "";
    $("steps").textContent = `Step ${step}${end}`;
    if (end) return;
    await pause(60);
    if (own !== descent) return;
    q = found.next;
    $("q").value = q;
  }
});
$("minimise").addEventListener("click", () => {
  descent++;
  minimise();
});

// ---- start

async function poll() {
  if (!document.hidden) await look();
  setTimeout(poll, POLL);
}
poll().then(() => (document.documentElement.dataset.ready = "true"));
moved();
