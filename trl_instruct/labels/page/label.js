// The labelling page. Texts of models and people become text nodes, never HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const clone = (value) => JSON.parse(JSON.stringify(value));
let labeler = localStorage.getItem("labeler") || "";
let about = { questions: [] };
let item = null; // what is shown
let draft = null; // what the labeler has said about it, kept over reloads
let chosen = 0; // index of the chosen response
let shownAt = 0;
let busy = false;
let looking = false; // at the progress
let stale = false; // what is shown of it

// ---- the server -----------------------------------------------------------------------------

function say(text, warn = false) {
  $("state").textContent = text;
  $("state").classList.toggle("warn", warn);
}

const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

// A server that is away, or restarts, gets the same request again until it has answered it.
async function call(name, given = {}) {
  let away = false;
  const body = JSON.stringify({ labeler, ...given });
  for (;;) {
    let response = null;
    try {
      response = await fetch(`/api/${name}`, {
        method: "POST", body, headers: { "Content-Type": "application/json" },
      });
      const content = await response.json();
      if (response.ok && away) say("The server answers again.");
      if (response.ok) return content;
      if (response.status < 500) throw new Refusal(content.error);
    } catch (error) {
      if (error instanceof Refusal) throw error;
    }
    away = true;
    say("The server does not answer. Trying again; what you entered is kept.", true);
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

class Refusal extends Error {}

// One request that changes something at a time.
async function act(action) {
  if (busy) return;
  busy = true;
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    say(error.message, true);
  } finally {
    busy = false;
  }
}

// ---- text -----------------------------------------------------------------------------------

function element(tag, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

// Characters that show nothing, or turn the direction of writing, are shown by their number.
const ODD = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069])/;
function plain(text) {
  return text.split(ODD).map((part) =>
    ODD.test(part)
      ? element("span", { className: "odd", text: `U+${part.charCodeAt(0).toString(16).padStart(4, "0")}` })
      : part);
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).flatMap((part) => {
    if (/^`.+`$/.test(part)) return [element("code", {}, ...plain(part.slice(1, -1)))];
    if (/^\*\*.+\*\*$/.test(part)) return [element("strong", {}, ...plain(part.slice(2, -2)))];
    return plain(part);
  });
}

const BULLET = /^\s*[-*•] +/;
const NUMBER = /^\s*\d+[.)] +/;

// Paragraphs with their line breaks, fenced code, lists; headings only where `headings` says so.
function render(text, headings = false) {
  const box = element("div", { className: "text", dir: "auto" });
  text.replace(/\r\n?/g, "\n").split(/^```[^\n]*\n?/m).forEach((part, number) => {
    if (number % 2) return box.append(element("pre", {}, ...plain(part.replace(/\n$/, ""))));
    for (const block of part.split(/\n\s*\n/).filter((b) => b.trim())) addBlock(box, block, headings);
  });
  return box;
}

function addBlock(box, block, headings) {
  let lines = [];
  const flush = () => {
    if (lines.length) box.append(element("p", {}, ...inline(lines.join("\n"))));
    lines = [];
  };
  let list = null;
  for (const line of block.replace(/^\n+|\n+$/g, "").split("\n")) {
    const mark = BULLET.test(line) ? BULLET : NUMBER.test(line) ? NUMBER : null;
    const heading = headings && line.match(/^(#+) +(.*)/);
    if (heading) {
      flush();
      box.append(element(`h${Math.min(heading[1].length, 2)}`, { text: heading[2] }));
    } else if (mark) {
      flush();
      const tag = mark === BULLET ? "UL" : "OL";
      if (!list || list.tagName !== tag) {
        list = element(tag);
        if (tag === "OL") list.start = parseInt(line, 10);
        box.append(list);
      }
      list.append(element("li", {}, ...inline(line.replace(mark, ""))));
    } else if (list && /^\s+\S/.test(line)) {
      list.lastChild.append("\n", ...inline(line.trim()));
    } else {
      list = null;
      lines.push(line);
    }
  }
  flush();
}

const MOST = 6000; // letters that are shown at once
function turns(content) {
  const box = element("div");
  for (const [role, text] of content) {
    if (role) box.append(element("div", { className: "role", text: role }));
    const part = element("div", {}, text.trim() ? render(text.slice(0, MOST)) : "(no text)");
    if (text.length > MOST) {
      const more = element("button", { text: `Show all ${text.length.toLocaleString("en")} letters` });
      more.onclick = () => part.replaceChildren(render(text));
      part.append(more);
    }
    box.append(part);
  }
  return box;
}

// ---- an item --------------------------------------------------------------------------------

const key = () => `draft ${labeler} ${item.item}`;
const keep = () => sessionStorage.setItem(key(), JSON.stringify(draft));
const seconds = () => (document.hidden ? 0 : (Date.now() - shownAt) / 1000);

document.addEventListener("visibilitychange", () => {
  if (!draft) return;
  if (document.hidden) draft.seconds += (Date.now() - shownAt) / 1000;
  shownAt = Date.now();
});

function show(content, answer = null) {
  about = content.questions ? content : about;
  document.querySelector("[data-tab=ask]").hidden = !about.models;
  item = content.item;
  $("item").hidden = !item;
  $("done").hidden = Boolean(item);
  for (const id of ["flag", "skip", "save"]) $(id).hidden = !item;
  $("actions").hidden = false;
  if (!item) return;
  const count = item.responses.length;
  const kept = sessionStorage.getItem(key());
  draft = answer ? revised(answer, count) : kept ? JSON.parse(kept) : {
    id: newId(), order: [...Array(count).keys()], tied: Array(count).fill(false),
    overall: Array(count).fill(null), checks: {}, flag: false, note: "", touched: false, seconds: 0,
  };
  shownAt = Date.now();
  $("prompt").replaceChildren(turns(item.prompt));
  $("note").value = draft.note;
  $("answers").replaceChildren(...draft.order.map(card));
  chosen = draft.order[0];
  refresh();
  scrollTo(0, 0);
}

// A draft that says what a saved answer said.
function revised(answer, count) {
  const all = [...Array(count).keys()];
  const ranks = answer.ranks || all;
  const order = all.sort((a, b) => ranks[a] - ranks[b]);
  return {
    id: newId(), order, overall: answer.overall || Array(count).fill(null),
    tied: ranks.map((rank, index) => {
      const at = order.indexOf(index);
      return at > 0 && ranks[order[at - 1]] === rank;
    }),
    checks: answer.checks || {}, flag: answer.flag, note: answer.note,
    touched: Boolean(answer.ranks), seconds: answer.seconds || 0,
  };
}

function card(index) {
  const up = element("button", { text: "▲", title: "Up", onclick: () => move(index, -1) });
  const down = element("button", { text: "▼", title: "Down", onclick: () => move(index, 1) });
  const grip = element("div", { className: "grip" }, element("span", { className: "place" }),
    element("span", { text: "⠿", ariaHidden: true }), up, down);
  const rate = element("div", { className: "rate", role: "group", ariaLabel: "Overall, 1 to 7" });
  rate.append(element("span", { text: "bad" }));
  for (let value = 1; value <= 7; value++) {
    rate.append(element("button", { text: value, onclick: () => setRating(index, value) }));
  }
  rate.append(element("span", { text: "good" }));
  rate.append(element("button", { className: "tie", text: "= as above", onclick: () => tie(index) }));
  const checks = element("div", { className: "checks" });
  for (const question of about.questions) {
    const box = element("input", { type: "checkbox" });
    box.onchange = () => {
      draft.checks[question] ||= Array(draft.order.length).fill(false);
      draft.checks[question][index] = box.checked;
      choose(index, false);
    };
    checks.append(element("label", {}, box, ` ${question}`));
  }
  const body = element("div", { className: "body" }, turns(item.responses[index]), rate, checks);
  const made = element("li", { className: "card", tabIndex: -1 }, grip, body);
  made.dataset.index = index;
  made.onclick = (event) => event.target.closest(".checks") || choose(index, false);
  return made;
}

const cardOf = (index) => document.querySelector(`.card[data-index="${index}"]`);

// Brings the cards up to what the draft says.
function refresh() {
  const ranks = ranksOf(draft);
  draft.order.forEach((index, at) => {
    const one = cardOf(index);
    one.classList.toggle("tied", draft.tied[index]);
    one.classList.toggle("chosen", index === chosen);
    one.tabIndex = index === chosen ? 0 : -1;
    one.querySelector(".place").textContent = ranks[index];
    one.ariaLabel = `Place ${ranks[index]} of ${draft.order.length}${draft.tied[index] ? ", tied with the one above" : ""}`;
    one.querySelector(".tie").hidden = at === 0;
    one.querySelector(".tie").ariaPressed = draft.tied[index];
    one.querySelectorAll(".rate button:not(.tie)").forEach((button, value) => {
      button.ariaPressed = draft.overall[index] === value + 1;
    });
    one.querySelectorAll(".checks input").forEach((box, q) => {
      box.checked = Boolean(draft.checks[about.questions[q]]?.[index]);
    });
  });
  $("flag").ariaPressed = draft.flag;
  keep();
}

function ranksOf({ order, tied }) {
  const ranks = [];
  let rank = 0;
  for (const index of order) {
    if (!tied[index]) rank += 1;
    ranks[index] = rank;
  }
  return ranks;
}

function choose(index, focus = true) {
  chosen = index;
  refresh();
  if (focus) {
    cardOf(index).focus({ preventScroll: true });
    cardOf(index).scrollIntoView({ block: "nearest" });
  }
}

// Who leaves a tie, or goes between two that are tied, leaves the others' tie as it was.
function place(index, to) {
  const { order, tied } = draft;
  const from = order.indexOf(index);
  to = Math.max(0, Math.min(order.length - 1, to));
  draft.touched = true;
  if (from === to) return refresh();
  if (!tied[index] && from + 1 < order.length) tied[order[from + 1]] = false;
  order.splice(from, 1);
  order.splice(to, 0, index);
  tied[index] = to > 0 && to + 1 < order.length && tied[order[to + 1]];
  tied[order[0]] = false;
  order.forEach((one, at) => {
    if ($("answers").children[at] !== cardOf(one)) $("answers").insertBefore(cardOf(one), $("answers").children[at]);
  });
  choose(index);
  say("");
}

const move = (index, by) => place(index, draft.order.indexOf(index) + by);

function tie(index) {
  if (draft.order[0] === index) return;
  draft.tied[index] = !draft.tied[index];
  draft.touched = true;
  choose(index);
}

function setRating(index, value) {
  draft.overall[index] = draft.overall[index] === value ? null : value;
  choose(index);
}

// ---- what a labeler does --------------------------------------------------------------------

function save(action) {
  if (!item) return;
  if (action === "label" && !draft.touched) {
    draft.touched = true;
    keep();
    return say("The answers are still in the order they came in. Save again if it is right.", true);
  }
  act(async () => {
    say("Saving …");
    const { id, overall, checks, flag, note } = draft;
    const rated = overall.some((rating) => rating !== null) ? overall : null;
    const done = key();
    const content = await call("save", {
      id, item: item.item, action, ranks: ranksOf(draft), overall: rated, checks, flag, note,
      seconds: draft.seconds + seconds(),
    });
    sessionStorage.removeItem(done);
    show(content);
    const counts = content.saved ? (action === "skip" ? "Skipped." : "Saved.")
      : "You have answered that prompt in another window; that answer counts.";
    say(counts, !content.saved);
    far();
  });
}

function undo() {
  act(async () => {
    const content = await call("undo", { id: newId() });
    if (!content.item) return say("There is nothing to take back.");
    show(content, content.answer);
    say("Taken back. Change it and save it again.");
    far();
  });
}

function flag() {
  draft.flag = !draft.flag;
  refresh();
}

$("save").onclick = () => save("label");
$("skip").onclick = () => save("skip");
$("undo").onclick = undo;
$("flag").onclick = flag;
$("note").oninput = () => { draft.note = $("note").value; keep(); };

document.addEventListener("click", (event) => {
  // After a click by mouse, Enter saves; it does not press the same button again.
  if (event.detail > 0 && event.target.closest("button")) document.activeElement.blur();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.activeElement.blur();
  if (event.target.closest("textarea, #name") || event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("label").hidden || !labeler || event.isComposing) return;
  const at = item ? draft.order.indexOf(chosen) : 0;
  const step = { ArrowUp: -1, k: -1, K: -1, ArrowDown: 1, j: 1, J: 1 }[event.key];
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1];
  if (event.key === "u") undo();
  else if (!item) return;
  else if (step && event.shiftKey) move(chosen, step);
  else if (step) choose(draft.order[Math.max(0, Math.min(draft.order.length - 1, at + step))]);
  else if (digit && event.shiftKey) place(chosen, digit - 1);
  else if (digit && digit <= 7) setRating(chosen, Number(digit));
  else if (event.key === "=") tie(chosen);
  else if (event.key === "Enter" && !event.target.closest("button")) save("label");
  else if (event.key === "s") save("skip");
  else if (event.key === "f") flag();
  else if (event.key === "n") $("note").focus();
  else return;
  event.preventDefault();
});

new Sortable($("answers"), {
  handle: ".grip", filter: "button", preventOnFilter: false, animation: 80, ghostClass: "dragged",
  forceFallback: true, // the same with a mouse, a finger and a pen
  onEnd: ({ item: one, newIndex }) => place(Number(one.dataset.index), newIndex),
});

// ---- tabs -----------------------------------------------------------------------------------

document.querySelector("nav").onclick = (event) => {
  const tab = event.target.dataset.tab;
  if (!tab) return;
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== tab;
  for (const button of document.querySelectorAll("nav button")) {
    button.toggleAttribute("aria-current", button === event.target);
  }
  document.querySelector("footer").hidden = tab !== "label";
  if (tab === "guide") guide();
  if (tab === "team") far();
};

async function guide() {
  const text = await (await fetch("/instructions.md")).text();
  $("guide").replaceChildren(render(text, true));
}

const share = (found) => !found ? "" :
  `${(100 * found.mean).toFixed(1)} %${found.low === null ? "" : ` [${(100 * found.low).toFixed(0)}, ${(100 * found.high).toFixed(0)}]`}`;
const lasted = (time) => (time === null || time === undefined ? "" : `${Math.round(time)} s`);

// How far everybody is.
async function far() {
  stale = true;
  if (!labeler || looking) return;
  looking = true;
  while (stale) {
    stale = false;
    await call("progress").then(showProgress, () => {});
  }
  looking = false;
}

function showProgress({ items, done, agreement, labelers }) {
  const own = labelers.find((one) => one.labeler === labeler);
  $("far").querySelector("progress").value = items ? done / items : 0;
  const told = [`${done} of ${items}`, `you ${own?.labelled ?? 0}`, lasted(own?.seconds), agreement && `agreement ${Math.round(100 * agreement.mean)} %`];
  $("far").querySelector("span").textContent = told.filter(Boolean).join(" · ");
  if ($("team").hidden) return;
  const row = (cells, tag) => element("tr", {}, ...cells.map((text) => element(tag, { text })));
  const rows = labelers.map((one) => row([one.labeler, one.labelled, one.skipped, one.flagged,
    lasted(one.seconds), share(one.agreement)], "td"));
  $("team").replaceChildren(element("h1", { text: "Team" }),
    element("table", {}, row(["Labeler", "Labelled", "Skipped", "Flagged", "Median time", "Agrees"], "th"), ...rows),
    element("p", { text: agreement
      ? `Two labelers order ${share(agreement)} of ${agreement.pairs} pairs alike (95 %). Pairs that one of them calls a tie are left out.`
      : "Nothing has been labelled by two people yet: start with --labels_per_prompt 2 to see how far they agree." }));
}

$("send").onclick = () => act(async () => {
  $("replies").replaceChildren("…");
  try {
    const { answers } = await call("ask", { prompt: $("question").value });
    $("replies").replaceChildren(...Object.entries(answers).map(([name, text]) =>
      element("section", {}, element("div", { className: "role", text: name }), turns([["", text]]))));
  } catch (error) {
    $("replies").textContent = error.message;
  }
});

// ---- begin ----------------------------------------------------------------------------------

$("who").onsubmit = (event) => {
  event.preventDefault();
  labeler = $("name").value.trim();
  if (labeler) begin();
};

function begin() {
  $("who").hidden = Boolean(labeler);
  if (!labeler) return $("name").focus();
  localStorage.setItem("labeler", labeler);
  document.title = `Label · ${labeler}`;
  act(async () => {
    show(await call("next"));
    say("");
    far();
  });
}

history.replaceState(null, "", "/"); // the token is in a cookie now
setInterval(() => { if (!document.hidden && !busy) far(); }, 5000);
begin();
