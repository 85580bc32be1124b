// The page of the assistant. No library, nothing from elsewhere.
// What people or the model wrote is put in as text (`textContent`), never as HTML.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);

function make(tag, { text, ...rest } = {}, ...children) {           // an element, with text, properties and children
  const element = Object.assign(document.createElement(tag), rest);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

const fill = (id) => $(`#${id}`).content.firstElementChild.cloneNode(true);

// --- what is kept in this browser: settings and a random session id

const kept = {
  get(key, otherwise = "") { try { return localStorage.getItem(`assistant.${key}`) ?? otherwise; } catch { return otherwise; } },
  set(key, value) { try { localStorage.setItem(`assistant.${key}`, value); } catch { /* a browser that keeps nothing */ } },
};

function randomId() {
  if (crypto.randomUUID) return crypto.randomUUID();                // only on https and localhost
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const session = kept.get("session") || randomId();
kept.set("session", session);

function setTheme(theme) {
  kept.set("theme", theme);
  document.documentElement.dataset.theme = theme;
}
setTheme(kept.get("theme", "system"));                              // before anything is painted

// --- talking to the server

class Refused extends Error {}                                      // the server said no, in words for people

let info = { limit: 4000, questions: [], reasons: {}, uses: {}, user: "" };

async function fetchOrSay(path, options) {
  let response;
  try { response = await fetch(path, options); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it running, and are you online?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refused(said.error || `The server answered with an error (${response.status}).`);
}

const asJson = (body, signal) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ session, ...body }), signal });
const get = async (path) => (await fetchOrSay(path)).json();
const post = async (path, body) => (await fetchOrSay(path, asJson(body))).json();

async function* events(response) {                                  // [kind, data] as they arrive
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const whole = buffer.split("\n\n");
    buffer = whole.pop();
    for (const one of whole) {
      const [, kind, data] = one.match(/^event: (\w+)\ndata: (.*)$/s) || [];
      if (kind) yield [kind, JSON.parse(data)];
    }
  }
}

// --- an answer, as elements

const MARKS = /```[^\n`]*\n?([\s\S]*?)(?:```|$)|`([^`\n]+)`|\*\*([^*\n]+)\*\*|\[(\d{1,2}(?:\s*,\s*\d{1,2})*)\]/g;

const breakable = (name) => name.split(/(?<=[._/(])(?=\w)/).flatMap((part, i) => i ? [make("wbr"), part] : [part]);      // long names may end a line after a dot

function written(text, cite, unfinished = false) {                  // code, bold and [n]; all else stays text
  const parts = [];
  let end = 0;
  if (unfinished && text.split("`").length % 2 === 0) text += "`";  // the end of a name is on its way
  for (const found of text.matchAll(MARKS)) {
    const [whole, block, code, bold, numbers] = found;
    const made = block !== undefined ? [make("pre", {}, make("code", { text: block.trimEnd() }))]
      : code !== undefined ? [make("code", {}, ...breakable(code))]
      : bold !== undefined ? [make("strong", { text: bold })]
      : numbers.split(",").map((number) => cite(Number(number)));
    parts.push(text.slice(end, found.index), ...(made.every(Boolean) ? made : [whole]));
    end = found.index + whole.length;
  }
  return [...parts, text.slice(end)];
}

const seconds = (value) => value == null ? "–" : value < 0.095 ? `${Math.max(1, Math.round(value * 1000))} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
const dollars = (value) => value == null ? "–" : value >= 0.01 ? `$${value.toFixed(2)}` : `$${Number(value.toPrecision(2)).toFixed(12).replace(/\.?0+$/, "")}`;
const counted = (n, one, many) => `${n} ${n === 1 ? one : many}`;
const APPS = { self_hosted: "Own model", third_party: "Provider’s model" };

// --- one question and its answer

let running = null;                                                 // the turn that is being answered

class Turn {
  constructor(question) {
    this.question = question;
    this.text = "";
    this.facts = null;
    this.root = fill("t-turn");
    const part = (name) => $(`.${name}`, this.root);
    for (const name of ["asked", "said", "notice", "under", "up", "down", "passages", "steps", "vote", "thanks"]) this[name] = part(name);
    this.toPassages = part("to-passages");
    this.toSteps = part("to-steps");
    this.asked.textContent = question;
    part("again").onclick = () => this.ask();
    part("copy").onclick = (click) => this.copy(click.currentTarget);
    this.toPassages.onclick = () => this.toggle(this.passages, this.toPassages);
    this.toSteps.onclick = () => this.showSteps();
    this.up.onclick = (click) => { if (click.detail < 2) this.voteUp(); };             // the second of a double click is none
    this.down.onclick = (click) => { if (click.detail < 2) this.voteDown(); };
    this.vote.onsubmit = (event) => { event.preventDefault(); this.sendForm(); };
    part("cancel").onclick = () => this.closeVote();
    part("change").onclick = () => this.openVote(this.last.good);
    for (const [key, words] of Object.entries(info.reasons)) {
      part("reasons").append(make("label", {}, make("input", { type: "radio", name: `reason-${session}-${Turn.count}`, value: key }), make("span", { text: words })));
    }
    Turn.count += 1;
    this.root.addEventListener("keydown", (event) => { if (event.key === "Escape" && this.closeOne(event.target)) event.stopPropagation(); });
    $("#turns").append(this.root);
  }

  // asking

  async ask() {
    if (running) return;
    this.text = "";
    this.notice.hidden = this.under.hidden = true;
    this.said.setAttribute("aria-busy", "true");
    this.said.replaceChildren();
    this.abort = new AbortController();
    setRunning(this);
    this.root.scrollIntoView({ block: "start" });
    let end = "broken";
    try {
      const response = await fetchOrSay("api/ask", asJson({ question: this.question }, this.abort.signal));
      for await (const [kind, data] of events(response)) {
        if (kind === "piece") this.write(this.text + data);
        else if (kind === "facts") { this.facts = data; end = "whole"; }
        else if (kind === "failed") { end = "failed"; this.why = data; }
      }
    } catch (error) {
      if (error.name === "AbortError") end = "stopped";
      else if (error instanceof Refused) { end = "failed"; this.why = error.message; }
    }
    this.said.setAttribute("aria-busy", "false");
    this.write(end === "whole" ? this.facts.answer || this.text : this.text, true);
    if (end === "whole") this.finish();
    else if (end === "stopped") this.say(this.text ? "You stopped the answer here." : "You stopped before there was an answer.");
    else if (this.text) this.say("The answer broke off here. What came so far may be incomplete.", this.why);
    else this.say("There is no answer to this at the moment.", this.why || "The server ended the connection.");
    this.why = "";
    setRunning(null);
  }

  write(text, now = false) {                                        // at most once a frame
    this.text = text;
    if (now) return this.paint();
    this.frame ??= requestAnimationFrame(() => this.paint());
  }

  paint() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.said.replaceChildren(...written(this.text, (number) => this.citation(number), this.said.ariaBusy === "true"));
  }

  citation(number) {
    const button = make("button", { type: "button", className: "cite", text: String(number), disabled: !this.facts });
    if (!this.facts) return button;
    const passage = this.facts.passages?.find((p) => p.number === number);
    if (!passage) return null;                                      // it stays text
    button.setAttribute("aria-label", `Passage ${number}, ${passage.document_id}`);
    button.title = passage.document_id;
    button.onclick = () => this.openPassage(number, button);
    return button;
  }

  say(what, why = "") {
    $(".what", this.notice).textContent = what;
    $(".why", this.notice).textContent = why || "";
    this.notice.hidden = false;
  }

  finish() {
    const { facts } = this, n = facts.passages?.length ?? 0;
    this.toPassages.textContent = counted(n, "passage", "passages");
    this.toPassages.hidden = !n;
    this.up.hidden = this.down.hidden = this.toSteps.hidden = !facts.trace_id;
    this.passages.replaceChildren(...(facts.passages ?? []).map((p) => this.passage(p)));
    $(".facts", this.root).textContent = [APPS[facts.app ?? info.app] ?? facts.app, facts.version && `version ${facts.version}`, seconds(facts.seconds), facts.unknown_names?.length && `no passage names ${facts.unknown_names.join(", ")}`, facts.unsaid_words?.length && `no document says ${facts.unsaid_words.join(", ")}`, this.root.previousElementSibling && "answered by itself: earlier questions are not remembered"].filter(Boolean).join(" · ");
    $(".facts", this.root).title = facts.served_by ? `Answered by ${facts.served_by}` : "";
    this.under.hidden = false;
    if (n && kept.get("passages") === "yes") this.toggle(this.passages, this.toPassages, true);
  }

  // passages, steps

  passage(p) {
    const root = fill("t-passage"), near = p.similarity;
    root.dataset.number = p.number;
    root.classList.toggle("cited", (this.facts.citations ?? []).includes(p.number));
    $(".number", root).textContent = p.number;
    $(".document", root).append(...breakable(p.document_id));
    $(".heading", root).textContent = p.heading ?? "";
    $(".text", root).textContent = p.text;
    if (near) {
      $(".words", root).textContent = `${near.toFixed(2)} similar`;
      $("i", root).style.width = `${Math.round(100 * Math.min(1, Math.max(0, near)))}%`;
    } else $(".near", root).hidden = true;
    return root;
  }

  openPassage(number, from) {
    this.toggle(this.passages, this.toPassages, true);
    this.back = from;
    for (const p of this.passages.children) p.classList.toggle("open", Number(p.dataset.number) === number);
    const open = $(".open", this.passages);
    open.focus({ preventScroll: true });
    open.scrollIntoView({ block: "nearest" });
  }

  toggle(panel, button, show = panel.hidden) {
    panel.hidden = !show;
    button.setAttribute("aria-expanded", String(show));
    if (!show) return;
    this.back = button;
    if (panel.offsetHeight < 0.6 * innerHeight) panel.scrollIntoView({ block: "nearest" });
  }

  closeOne(target) {                                                // the panel in which the key was pressed, or else the last one that is open
    const open = [this.passages, this.steps, this.vote].filter((panel) => !panel.hidden);
    const panel = open.find((p) => p.contains(target)) ?? open.at(-1);
    if (!panel) return false;
    if (panel === this.vote) this.closeVote();
    else {
      const button = panel === this.steps ? this.toSteps : this.toPassages;
      this.toggle(panel, button, false);
      (panel === this.passages && this.back?.isConnected ? this.back : button).focus();
    }
    return true;
  }

  async showSteps() {
    this.toggle(this.steps, this.toSteps);
    if (this.steps.hidden || this.traced) return;
    this.steps.replaceChildren(this.numbers(), make("p", { className: "soft small", text: "Looking up the trace …" }));
    for (let tries = 0; tries < 12 && !this.steps.hidden && !this.traced; tries += 1) {      // it is written after the answer, step by step
      if (tries) await new Promise((done) => { setTimeout(done, 1000); });
      try {
        const trace = await get(`api/trace/${encodeURIComponent(this.facts.trace_id)}`);
        this.steps.replaceChildren(this.numbers(), this.bars(trace), this.traceLine());
        this.traced = trace.complete;
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        if (tries > 3) this.steps.replaceChildren(this.numbers(), make("p", { className: "soft small", text: error.message }), this.traceLine());
      }
      if (!tries) this.steps.scrollIntoView({ block: "nearest" });
    }
  }

  numbers() {
    const f = this.facts, cell = (name, value) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }));
    return make("dl", { className: "numbers" },
      cell("First words", seconds(f.first_token_seconds)), cell("Whole answer", seconds(f.seconds)),
      cell("Tokens in + out", `${f.prompt_tokens ?? "–"} + ${f.completion_tokens ?? "–"}`), cell("Cost", dollars(f.cost_usd)));
  }

  bars(trace) {
    let busy = 0;
    const rows = trace.steps.map((step) => {
      const bar = make("i");
      bar.style.left = `${100 * Math.min(0.99, step.at / trace.seconds)}%`;
      bar.style.width = `${100 * Math.min(1, step.seconds / trace.seconds)}%`;
      busy += step.seconds;
      return make("li", { className: step.kind === "CHAT_MODEL" ? "model" : "" }, make("span", { text: step.name }), make("span", { className: "track", ariaHidden: "true" }, bar), make("span", { text: seconds(step.seconds) }));
    });
    return make("div", { className: "bars" }, make("ol", {}, ...rows), busy > 1.1 * trace.seconds ? make("p", { className: "soft small", text: "Steps overlap: an answer is checked and sent on while it is written." }) : "");
  }

  traceLine() {
    const by = this.facts.served_by ? ["Answered by ", make("b", { text: this.facts.served_by }), " · "] : [];
    return make("p", { className: "soft small" }, ...by, "trace ", make("code", { text: this.facts.trace_id }));
  }

  async copy(button) {
    const done = await navigator.clipboard.writeText(this.text).then(() => true, () => false);
    button.title = done ? "Copied" : "The browser does not allow copying here";
    button.classList.toggle("done", done);
    setTimeout(() => { button.title = "Copy the answer"; button.classList.remove("done"); }, 1500);
  }

  // votes

  voteUp() {
    if (this.last?.good) return this.openVote(true);
    this.sendVote({ good: true, reason: "", comment: "", correction: "" });
  }

  voteDown() {                                                      // the click counts by itself; the form says more
    const counted = this.last?.good === false;
    this.openVote(false);
    if (!counted) this.sendVote({ good: false, reason: "", comment: "", correction: "" }, false);
  }

  openVote(good) {
    if (!this.vote.hidden && this.vote.good === good) return this.closeVote();
    this.vote.good = good;
    this.thanks.hidden = true;
    $(".reasons", this.vote).hidden = $(".correction-field", this.vote).hidden = good;
    if (!info.about) $(".correction", this.vote).placeholder = "What the page says";      // documents of somebody's own have no names to say
    $(".wrong", this.vote).hidden = true;
    this.vote.hidden = false;
    this.mark(good);
    ((!good && $("input", this.vote)) || $(".comment", this.vote)).focus({ preventScroll: true });
    this.vote.scrollIntoView({ block: "nearest" });
  }

  closeVote() {
    const good = this.vote.good;
    this.vote.hidden = true;
    this.thanks.hidden = !this.last;
    this.mark(this.last?.good);
    (good ? this.up : this.down).focus();
  }

  mark(good) {
    this.up.setAttribute("aria-pressed", String(good === true));
    this.down.setAttribute("aria-pressed", String(good === false));
  }

  sendForm() {
    const good = this.vote.good, value = (name) => $(name, this.vote).value.trim();
    this.sendVote({ good, comment: value(".comment"), reason: good ? "" : $("input:checked", this.vote)?.value ?? "", correction: good ? "" : value(".correction") });
  }

  sendVote(vote, closes = true) {                                   // one after the other; the same said twice is one vote
    const words = JSON.stringify(vote);
    if (this.words === words && this.sending) return;
    if (this.words !== words) [this.words, this.event] = [words, randomId()];
    this.sending = this.postVote(vote, this.event, closes, this.sending).finally(() => { if (this.words === words) this.sending = null; });
  }

  async postVote(vote, event, closes, before) {
    const wrong = $(".wrong", this.vote), button = $(".primary", this.vote);
    if (closes) button.disabled = true;
    this.mark(vote.good);
    try {
      await before;
      await post("api/vote", { trace_id: this.facts.trace_id, event_id: event, ...vote });
      this.last = vote;
      wrong.hidden = true;
      $("span", this.thanks).textContent = vote.good ? "Thank you. It counts towards how well this version does."
        : vote.correction ? "Thank you. A reviewer looks at your correction; accepted, it becomes something to learn from." : "Thank you. A reviewer looks at it, and finds the right answer.";
      $(".change", this.thanks).textContent = vote.good ? "Add a comment" : "Change";
      if (!closes) return;
      const inside = this.vote.contains(document.activeElement);
      this.vote.hidden = true;
      this.thanks.hidden = false;
      if (inside) (vote.good ? this.up : this.down).focus({ preventScroll: true });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (this.vote.hidden) this.openVote(vote.good);
      wrong.textContent = error.message;
      wrong.hidden = false;
      this.mark(this.last?.good);
    } finally { if (closes) button.disabled = false; }
  }
}
Turn.count = 0;

// --- the composer

function setRunning(turn) {
  running = turn;
  $("#send").hidden = Boolean(turn);
  $("#stop").hidden = !turn;
  if (!turn && [$("#stop"), document.body, null].includes(document.activeElement)) $("#question").focus({ preventScroll: true });
}

function hint(words, wrong = false) {
  $("#hint").textContent = words;
  $("#hint").classList.toggle("bad", wrong);
}
const REMINDER = "It can be wrong. Check the passages.";

function checkQuestion() {
  const field = $("#question"), over = field.value.trim().length - info.limit;
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
  if (over > 0) hint(`A question has at most ${info.limit.toLocaleString("en")} characters; this one is ${over.toLocaleString("en")} too long.`, true);
  else hint(REMINDER);
  $("#send").disabled = !field.value.trim() || over > 0;
  return !$("#send").disabled;
}

function askQuestion(question) {
  if (running) return;
  $("#empty").hidden = true;
  document.body.classList.add("talking");
  new Turn(question).ask();
}

function submit() {
  const field = $("#question");
  if (running || !checkQuestion()) return field.focus();
  const question = field.value.trim();
  field.value = "";
  checkQuestion();
  askQuestion(question);
}

// --- the review tab

const THUMBS = { true: "Good", false: "Bad" };

function reviewer() { return info.user || kept.get("reviewer").trim(); }

function showReviewer() {
  $("#name-field").hidden = $("#reviewer-field").hidden = Boolean(info.user);
  $("#who").textContent = info.user ? `You review as ${info.user}.` : "";
  for (const field of [$("#name"), $("#reviewer")]) if (field !== document.activeElement) field.value = kept.get("reviewer");
}

function reviewNotice(words) {
  $("#review-notice").textContent = words;
  $("#review-notice").hidden = !words;
}

function countWaiting(n) { $("#to-review").replaceChildren("Review", ...(n ? [make("span", { className: "count", text: n, ariaLabel: `${n} waiting` })] : [])); }

async function loadReviews() {
  showReviewer();
  const cases = $("#cases");
  cases.setAttribute("aria-busy", "true");
  try {
    const { waiting } = await get("api/reviews");
    cases.replaceChildren(...waiting.map(reviewCase));
    countWaiting(waiting.length);
    reviewNotice(waiting.length ? "" : "Nothing waits. What people say of answers appears here.");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    reviewNotice(error.message);
  }
  cases.setAttribute("aria-busy", "false");
}

function reviewCase(row) {
  const root = fill("t-case"), part = (name) => $(`.${name}`, root);
  part("vote-word").textContent = THUMBS[Boolean(row.good)];
  part("vote-word").classList.add(row.good ? "good" : "bad");
  part("reason-word").textContent = info.reasons[row.reason] ?? row.reason ?? "";
  part("by").textContent = [(row.source ?? "").replace(/^session-(.{8}).*/, "session $1"), row.time && new Date(row.time).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" })].filter(Boolean).join(", ");
  part("asked").textContent = row.question ?? "";
  part("said").replaceChildren(...written(row.answer ?? "", () => null));
  part("comment").textContent = row.comment ?? "";
  part("comment").hidden = !row.comment;
  part("right").value = row.correction || (row.good ? row.answer : "") || "";
  part("from").textContent = row.correction ? "as the user put it" : row.good ? "as the assistant gave it" : "nobody gave one yet";
  const uses = Object.entries(info.uses);
  uses.forEach(([key, words], i) => part("uses").append(make("label", { className: "check" }, make("input", { type: "checkbox", value: key, checked: key === "pair" || (i === 0 && !info.uses.pair) }), make("span", { text: words }))));
  part("uses").hidden = !uses.length;

  const decide = async (accept) => {
    const wrong = part("wrong"), buttons = root.querySelectorAll("button"), chosen = [...root.querySelectorAll(".uses input:checked")].map((box) => box.value);
    const complain = (words) => { wrong.textContent = words; wrong.hidden = false; };
    if (!reviewer()) { complain("Reviewing needs a name: enter yours above."); return $("#name").focus(); }
    if (accept && !chosen.length) return complain("Choose what it becomes, or reject it.");
    wrong.hidden = true;
    for (const button of buttons) button.disabled = true;
    try {
      await post("api/review", { feedback_id: row.feedback_id, by: reviewer(), accept, answer: part("right").value.trim(), uses: chosen });
      const words = accept ? `Accepted: ${chosen.map((key) => info.uses[key].replace(/\.$/, "")).join("; ")}.` : "Rejected.";
      root.replaceWith(make("p", { className: "decided", role: "status", tabIndex: -1 }, make("b", { text: words }), ` ${row.question ?? ""}`));
      countWaiting(document.querySelectorAll(".case").length);
      ($(".case .right") ?? $("#reload")).focus();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      complain(error.message);
      for (const button of buttons) button.disabled = false;
    }
  };
  part("accept").onclick = () => decide(true);
  part("reject").onclick = () => decide(false);
  return root;
}

// --- the page

function route() {
  const review = location.hash === "#review";
  $("#ask-page").hidden = review;
  $("#review-page").hidden = !review;
  for (const [link, here] of [[$("#to-ask"), !review], [$("#to-review"), review]]) here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  document.title = review ? "Review · Assistant" : "Assistant";
  if (review) loadReviews(); else $("#question").focus({ preventScroll: true });
}

function start() {
  const dialog = $("#settings"), theme = $(`input[name=theme][value=${CSS.escape(kept.get("theme"))}]`);
  if (theme) theme.checked = true;
  $("#theme").onchange = (event) => setTheme(event.target.value);
  $("#show-passages").checked = kept.get("passages") === "yes";
  $("#show-passages").onchange = (event) => kept.set("passages", event.target.checked ? "yes" : "no");
  for (const field of [$("#name"), $("#reviewer")]) field.oninput = () => { kept.set("reviewer", field.value); showReviewer(); };
  $("#open-settings").onclick = () => { showReviewer(); dialog.showModal(); };
  $("#close-settings").onclick = () => dialog.close();
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  $("#reload").onclick = loadReviews;
  $("#stop").onclick = () => running?.abort.abort();
  $("#question").oninput = checkQuestion;
  $("#question").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); } };
  $("#composer").onsubmit = (event) => { event.preventDefault(); submit(); };
  addEventListener("hashchange", route);
  checkQuestion();
  get("api/info").then((found) => {
    info = { ...info, ...found };
    $("#env").textContent = info.env;
    $("#env").hidden = false;
    if (info.about) $("#about").textContent = `Answers come from ${info.about}, with the passages they rest on, so you can check them.`;
    $("#examples").replaceChildren(...info.questions.map((question) => {
      const button = make("button", { type: "button", text: question });
      button.onclick = () => askQuestion(question);
      return make("li", {}, button);
    }));
  }).catch((error) => hint(error.message, true)).finally(route);
}
addEventListener("DOMContentLoaded", start);
