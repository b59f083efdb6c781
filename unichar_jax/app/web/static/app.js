// The page of the web demo. The server keeps everything that was said; this file shows it.
//
// A stream of server-sent events brings entries (turns, sheets, answers), each as a whole, whenever one changes.
// The browser reconnects by itself and names the last version it saw, so nothing here has to remember.
"use strict";

const $ = (id) => document.getElementById(id);
const entries = new Map(); // id -> {entry, node, update}
const WORDS = { waiting: "waiting", writing: "writing", planning: "planning the picture", drawing: "drawing" };
let hello, guest, chosen = null;

function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

function toast(message) {
  $("toast").textContent = message;
  $("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").hidden = true), 6000);
}

async function post(at, body) {
  const raw = body instanceof Blob;
  let response;
  try {
    response = await fetch(at, {
      method: "POST",
      headers: { "content-type": raw ? "application/octet-stream" : "application/json" },
      body: raw ? body : JSON.stringify(body),
    });
  } catch {
    throw new Error("The server cannot be reached; please try again.");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401 && at !== "/api/login") location.reload();
  if (!response.ok) throw new Error(answer.message || "That did not work.");
  return answer;
}

// Runs what a person asked for; says so if it fails.
const attempt = (action) => action().catch((error) => toast(error.message));

// -- pictures ----------------------------------------------------------------------------------------------

// A small model's pictures are small: enlarged beyond this they would only look worse than they are.
const LARGEST = 4;

function pictureButton(at, alt, about = alt) {
  const button = el("button", { type: "button", title: about }, el("img", { src: at, alt, loading: "lazy" }));
  button.onclick = () => view(at, alt, about);
  return button;
}

function figure(at, alt, caption) {
  return el("figure", {}, pictureButton(at, alt, `${alt} (${caption})`), el("figcaption", { textContent: caption }));
}

function view(at, alt, about) {
  const dialog = $("viewer");
  const img = dialog.querySelector("img");
  img.onload = () => (img.style.maxHeight = `min(68vh, ${LARGEST * img.naturalHeight}px)`);
  Object.assign(img, { src: at, alt });
  dialog.querySelector("p").textContent = about;
  Object.assign(dialog.querySelector("[data-do=save]"), { href: at });
  dialog.querySelector("[data-do=close]").onclick = () => dialog.close();
  dialog.onclick = (event) => event.target === dialog && dialog.close(); // beside it
  dialog.querySelector("[data-do=ask]").onclick = () =>
    attempt(async () => {
      const blob = await (await fetch(at)).blob();
      await choose(blob);
      dialog.close();
      openTab("ask");
      $("question").focus();
    });
  dialog.showModal();
}

// -- entries -----------------------------------------------------------------------------------------------

const running = (entry) => entry.status in WORDS;

function setState(node, entry, word = WORDS[entry.status]) {
  node.replaceChildren();
  node.classList.toggle("bad", entry.status === "failed");
  node.hidden = entry.status === "done";
  if (entry.status === "failed") node.textContent = entry.note;
  if (entry.status === "stopped") node.textContent = "stopped";
  if (!running(entry)) return;
  const stop = el("button", { type: "button", className: "quiet", textContent: "Stop" });
  stop.onclick = () => attempt(() => post("/api/stop", { entry: entry.id }));
  node.append(el("span", { className: "dots", textContent: word }), stop);
}

function turn(entry) {
  const reply = el("p", { className: "said them" });
  const state = el("p", { className: "state" });
  const drawn = el("div");
  const you = el("p", { className: "said you", textContent: entry.user });
  const node = el("div", { className: "turn" }, you, reply, drawn, state);
  let shown = "";
  return {
    node,
    place: $("turns"),
    update(now) {
      reply.hidden = !now.reply;
      if (reply.textContent !== now.reply) reply.textContent = now.reply;
      setState(state, now);
      if (now.picture && now.picture !== shown) {
        shown = now.picture;
        drawn.replaceChildren(
          figure(`/pictures/${now.picture}`, `${guest.name}: ${now.reply}`, `seed ${now.picture_seed}, ${now.steps} steps`)
        );
        if (now.instruction)
          drawn.append(el("details", {}, el("summary", { textContent: "The plan" }), el("p", { textContent: now.thinking }),
            el("p", { textContent: now.instruction })));
      } else if (now.status === "drawing") {
        drawn.replaceChildren(el("figure", {}, el("div", { className: "wait" })));
      } else if (!now.picture) {
        drawn.replaceChildren();
      }
    },
  };
}

function sheet(entry) {
  const state = el("p", { className: "state" });
  const pictures = el("div", { className: "pictures" });
  const again = el("button", { type: "button", className: "quiet", textContent: "Again, with other seeds" });
  again.onclick = () => attempt(() => post("/api/draw", { ...asked(entry), seed: -1 }));
  const about = `seeds ${entry.seed} to ${entry.seed + entry.wanted - 1}, ${entry.steps} steps, guidance ${entry.guidance}`;
  const node = el("article", { className: "sheet card" }, el("h3", { textContent: entry.prompt }),
    el("div", { className: "options" }, el("span", { textContent: about }), again, state), pictures);
  return {
    node,
    place: $("sheets"),
    newestFirst: true,
    update(now) {
      setState(state, now);
      again.hidden = running(now);
      const made = now.pictures.map((p) => figure(`/pictures/${p.name}`, now.prompt, `seed ${p.seed}, ${now.steps} steps`));
      const waiting = running(now) ? now.wanted - made.length : 0;
      pictures.replaceChildren(...made, ...Array.from({ length: waiting }, () => el("div", { className: "wait" })));
    },
  };
}

const asked = (e) => ({ guest: e.guest, prompt: e.prompt, n: e.wanted, steps: e.steps, guidance: e.guidance });

function answer(entry) {
  const state = el("p", { className: "state" });
  const text = el("p");
  const picture = el("figure", {}, pictureButton(`/pictures/${entry.picture}`, "The picture asked about"));
  const node = el("article", { className: "answer card" }, picture,
    el("div", {}, el("h3", { textContent: entry.question }), text, state));
  return {
    node,
    place: $("answers"),
    newestFirst: true,
    update(now) {
      text.textContent = now.text;
      setState(state, now);
    },
  };
}

const KINDS = { turn, sheet, answer };

function receive(changed) {
  const log = $("turns");
  const last = log.lastElementChild; // of a log that scrolls, or of a page that does
  const atEnd = !last || last.getBoundingClientRect().bottom < innerHeight + 40;
  for (const entry of changed) {
    let known = entries.get(entry.id);
    if (entry.status === "removed") {
      known?.node.remove();
      entries.delete(entry.id);
      continue;
    }
    if (!known) entries.set(entry.id, (known = { ...KINDS[entry.kind](entry), entry }));
    known.entry = entry;
    if (entry.guest === guest.id) {
      if (!known.node.isConnected) known.newestFirst ? known.place.prepend(known.node) : known.place.append(known.node);
      known.update(entry);
    }
  }
  $("greetings").hidden = log.querySelector(".turn") !== null;
  if (atEnd) toEnd();
}

function toEnd() {
  const last = $("turns").querySelector(".turn:last-child");
  const show = () => last.scrollIntoView({ block: "end" });
  if (!last) return;
  show();
  // A picture that arrives later makes the turn longer.
  last.querySelectorAll("img").forEach((img) => img.complete || (img.onload = show));
}

// -- the character -----------------------------------------------------------------------------------------

function meet(id) {
  guest = hello.guests.find((g) => g.id === id) || hello.guests[0];
  history.replaceState(null, "", `#${guest.id}`);
  document.title = `${guest.name} · UniChar`;
  for (const button of $("guests").children) button.setAttribute("aria-pressed", button.value === guest.id);
  $("name").textContent = guest.name;
  $("description").textContent = guest.description;
  $("run").textContent = `from the run ${guest.run}`;
  const count = guest.pictures.length;
  $("trained").textContent = `Trained on ${count === 1 ? "this picture" : `these ${count} pictures`}`;
  $("trained").hidden = !count;
  $("training").replaceChildren(...guest.pictures.map((p) => pictureButton(p.at, p.caption)));
  $("text").placeholder = `Say something to ${guest.name} …`;
  chips("greetings", guest.greetings, (text) => {
    $("text").value = text;
    $("say").requestSubmit();
  });
  chips("ideas", guest.ideas, (text) => ($("prompt").value = text));
  $("prompt").placeholder = guest.ideas[0] || `${guest.name} in the snow`;
  for (const place of ["turns", "sheets", "answers"]) $(place).replaceChildren();
  if (guest.opening) $("turns").append(el("p", { className: "said them", textContent: guest.opening }));
  receive([...entries.values()].map((known) => known.entry));
  toEnd();
}

function chips(place, texts, use) {
  const short = (text) => (text.length > 70 ? text.slice(0, 67) + " …" : text);
  $(place).replaceChildren(...texts.map((text) =>
    el("button", { type: "button", textContent: short(text), title: text, onclick: () => use(text) })));
}

// -- tabs --------------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function openTab(name) {
  for (const tab of tabs) {
    const mine = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", mine);
    tab.tabIndex = mine ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !mine;
  }
  $("forget").hidden = name !== "talk";
}

tabs.forEach((tab, i) => {
  tab.onclick = () => openTab(tab.getAttribute("aria-controls"));
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  };
});

// -- forms -------------------------------------------------------------------------------------------------

function onSubmit(id, action) {
  const form = $(id);
  form.onsubmit = (event) => {
    event.preventDefault();
    const button = form.querySelector(".primary");
    button.disabled = true;
    attempt(() => action(form)).finally(() => (button.disabled = false));
  };
  for (const area of form.querySelectorAll("textarea"))
    area.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    };
}

onSubmit("login", async (form) => {
  await post("/api/login", { name: form.name.value, password: form.password.value });
  form.reset();
  await start();
});

onSubmit("say", async (form) => {
  const text = form.text.value;
  await post("/api/say", { guest: guest.id, text, picture: form.picture.checked, thinking: form.thinking.checked });
  if (form.text.value === text) form.text.value = "";
  toEnd();
});

onSubmit("drawing", (form) =>
  post("/api/draw", {
    guest: guest.id,
    prompt: form.prompt.value,
    n: Number(form.n.value),
    steps: Number(form.steps.value),
    guidance: Number(form.guidance.value),
    seed: form.seed.value === "" ? -1 : Number(form.seed.value),
  }));

onSubmit("asking", async (form) => {
  if (!chosen) throw new Error("Please choose a picture first.");
  await post("/api/ask", { guest: guest.id, picture: chosen, question: form.question.value });
  form.question.value = "";
});

async function choose(file) {
  if (file.size > hello.limits.max_upload)
    throw new Error(`The picture is too large; at most ${Math.round(hello.limits.max_upload / 2 ** 20)} MiB are taken.`);
  const sent = await post("/api/picture", file.slice());
  chosen = sent.picture;
  $("chosen").src = `/pictures/${chosen}`;
  $("chosen").hidden = false;
  $("hint").querySelector("b").textContent = "Choose another";
  $("hint").querySelector("small").hidden = true;
}

$("upload").onchange = (event) => {
  const [file] = event.target.files;
  if (file) attempt(() => choose(file));
  event.target.value = "";
};
$("drop").ondragover = (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
};
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) attempt(() => choose(file));
};
$("forget").onclick = () => attempt(() => post("/api/forget", { guest: guest.id }));
$("logout").onclick = () => attempt(() => post("/api/logout", {}).then(() => location.reload()));

// -- the beginning -----------------------------------------------------------------------------------------

function listen() {
  const stream = new EventSource("/api/events");
  stream.onopen = () => ($("offline").hidden = true);
  stream.onmessage = (event) => receive(JSON.parse(event.data));
  stream.addEventListener("reset", () => {
    entries.forEach((known) => known.node.remove());
    entries.clear();
    receive([]);
  });
  stream.addEventListener("gone", () => {
    stream.close();
    toast("This conversation is open in many other windows; reload this one to use it here.");
  });
  stream.onerror = () => {
    $("offline").hidden = false;
    // A server that has forgotten the visitor answers with an error, and the browser does not ask again.
    if (stream.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 3000);
  };
}

async function start() {
  const response = await fetch("/api/hello");
  hello = await response.json();
  $("login").hidden = !hello.login;
  if (hello.login) return $("login").querySelector("input").focus();
  if (!response.ok) throw new Error(hello.message);
  $("stage").hidden = false;
  $("user").textContent = hello.user;
  $("logout").hidden = !hello.user;
  for (const g of hello.guests) {
    const button = el("button", { type: "button", value: g.id, onclick: () => meet(g.id) });
    if (g.pictures.length) button.append(el("img", { src: g.pictures[0].at, alt: "" }));
    button.append(g.name);
    $("guests").append(button);
  }
  $("guests").hidden = hello.guests.length < 2;
  const form = $("drawing");
  form.n.max = hello.limits.max_pictures;
  form.steps.max = hello.limits.max_steps;
  form.steps.value = hello.limits.steps;
  form.guidance.value = hello.limits.guidance;
  for (const area of document.querySelectorAll("textarea")) area.maxLength = hello.limits.max_text;
  meet(decodeURIComponent(location.hash.slice(1)));
  listen();
}

attempt(start);
