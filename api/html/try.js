"use strict";
// Before this line the service writes TEXTS: { en: { page, checks, messages, hints }, ar: { … } }.
const tenths = (value) => value.toLocaleString("en", { maximumFractionDigits: 1 });
const SHARE = (value) => tenths(100 * value) + "%", DEGREES = (value) => tenths(value) + "°";
const UNITS = { face_too_small: (value) => tenths(value) + " px", face_too_large: SHARE, face_cut_off: SHARE, too_dark: SHARE,
  too_bright: SHARE, uneven_light: SHARE, head_tilted: DEGREES, head_turned: DEGREES, head_raised_or_lowered: DEGREES,
  landmarks_hidden: SHARE, mask: SHARE, sunglasses: SHARE, face_covered: SHARE, eyes_closed: SHARE };
// Of a frame while guiding; of a photo that is drawn; and of one that is taken.
const GUIDE_SIDE = 720, DRAWN_SIDE = 1400, TAKEN_SIDE = 4096;
const LEAST_PAUSE_MS = 350, OFFLINE_PAUSE_MS = 3000, LONGEST_RETRY_MS = 10000, RETRIES = 3, COPIED_MS = 2000;
const READING_MS = 1500;  // how long an advice stands, so that it can be read, and is not lost in a flood when read out
const HOLD_MS = 1000;  // how long everything is good before the photo is taken by itself
const COMPACT_MODEL = "sface-2021dec";
// Of a frame of a challenge; between two looks at a step; and what is kept of a challenge's time to send its frames.
const STEP_SIDE = 640, STEP_PAUSE_MS = 250, SENDING_MS = 10000;
// When a step is done: the same limits as in benchmarks/challenges.py, which measured them.
const FIRST_DEG = 12, STRAIGHT_DEG = 7, TURNED_DEG = 21, CLOSER = 1.28;
const ACTIONS = ["turn_left", "turn_right", "come_closer"];
const ABOUT_STEPS = ["challenge_required", "challenge_expired", "challenge_failed"];
const NO_PHOTO = ["empty_file", "unreadable_image", "unsupported_format"], TOO_LARGE = ["file_too_large", "image_too_large"];
const SIGNS = { good: "M7 12.5l3.5 3.5L17 8.5", bad: "M12 6.5v7M12 17v.2" };
const LANGUAGES = Object.keys(TEXTS);

const byId = (id) => document.getElementById(id);
const rest = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const say = (name) => TEXTS[language].page[name];
const video = byId("video"), picture = byId("picture"), statusLine = byId("status"), stage = byId("stage");
let language = recall("localStorage", "language");
if (!TEXTS[language]) language = navigator.languages.map((one) => one.slice(0, 2).toLowerCase()).find((one) => TEXTS[one]) || "en";
// `photo` is { blob, mirrored, bitmap, analysis, fit, key }. Only a photo that is `fit` can be signed up or verified. With
// the same key a sign-up whose answer was lost is safely sent again.
let stream = null, opening = false, photo = null, live = 0, busy = false, turns = 0;
// The user_id of the latest verification: the person to whom a photo can be added, this one or a new one.
let person = null;
// What the page says now. All words are functions, so that they can be said again in another language.
let shown = { mood: "", words: () => say("begin"), details: [], next: [], then: "" }, analysis = null;

// A browser that keeps no data for pages refuses even to be asked.
function recall(storage, name) {
  try { return window[storage].getItem(name); } catch { return null; }
}
function remember(storage, name, value) {
  try { window[storage].setItem(name, value); } catch { /* it is asked for again */ }
}

// --- what is seen ---

function translate() {
  document.documentElement.lang = language;
  document.documentElement.dir = say("direction");
  document.title = say("title");
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = say(one.dataset.text);
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", say(one.dataset.label));
  byId("language").textContent = TEXTS[otherLanguage()].page.language;
  byId("language").lang = otherLanguage();
  for (const one of document.querySelectorAll("header, main")) one.hidden = false;
  list(analysis);
  show();
}

function otherLanguage() {
  return LANGUAGES[(LANGUAGES.indexOf(language) + 1) % LANGUAGES.length];
}

// The one place that decides which pictures and buttons are there, and which button is the next step.
function refresh() {
  const here = document.activeElement, drawn = photo && photo.bitmap;
  video.hidden = !stream;
  byId("guide").toggleAttribute("hidden", !stream);
  byId("page").classList.toggle("guided", Boolean(stream));
  picture.hidden = Boolean(!drawn || stream);
  picture.classList.toggle("mirrored", Boolean(photo && photo.mirrored));
  if (drawn) picture.setAttribute("aria-label", `${say("pictureOf")} ${photo.analysis ? photo.analysis.faces.length : "–"}`);
  byId("empty").hidden = Boolean(stream || drawn);
  byId("invitation").textContent = say(photo ? "unreadable" : "empty");
  for (const name of ["sign-up", "verify", "add-photo"]) {
    byId(name).hidden = !photo;
    byId(name).disabled = busy || !(photo && photo.fit);
  }
  byId("add-photo").hidden ||= !person;
  byId("capture").hidden = !stream || busy;
  byId("choose").hidden = Boolean(stream);
  byId("camera").textContent = say(stream ? "cameraOff" : photo && photo.mirrored ? "cameraAgain" : "cameraOn");
  byId("choose-text").textContent = say(photo ? "chooseAgain" : "choose");
  for (const one of [byId("capture"), byId("file")]) one.disabled = busy;
  byId("camera").disabled = busy && !stream;
  if (here && here.closest("[hidden]")) byId("camera").focus();  // what had the focus is gone: to what stands in its place
  const source = navigator.mediaDevices && !(photo && !photo.mirrored) ? "camera" : "choose";
  const next = stream ? ["capture"] : photo ? shown.next : ["source"];
  for (const one of document.querySelectorAll(".buttons > *"))
    one.classList.toggle("main", next.includes(one.id) || (next.includes("source") && one.id === source));
}

// Say how things stand (`mood` is "good", "bad" or "") and why, and mark the buttons of the next step: their ids, or
// "source" for another photo from where this one came from. `then` names the text that says the next step.
function tell(mood, words, details = [], next = [], then = "") {
  shown = { mood, words, details, next, then };
  show();
}

function show() {
  const { mood, words, details, then } = shown, text = words();
  if (statusLine.textContent !== text) statusLine.textContent = text;
  byId("outcome").className = "outcome " + mood;
  byId("sign").parentElement.toggleAttribute("hidden", !mood);
  byId("sign").setAttribute("d", SIGNS[mood] || "");
  byId("detail").replaceChildren(...details.map((detail) => detail()));
  byId("next").textContent = then ? say(then) : "";
  refresh();
}

function made(tag, name, ...children) {
  const element = document.createElement(tag);
  element.className = name;
  element.append(...children);
  return element;
}

const line = (words) => () => made("p", "", words());

// Numbers and ids keep their own direction among Arabic words.
function isolated(text) {
  const element = made("bdi", "", text);
  element.dir = "ltr";
  return element;
}

function round(value) {
  return Number(value).toLocaleString("en", { maximumSignificantDigits: 3 });
}

const nameOf = (check) => TEXTS[language].checks[check.code] || check.code;
const valueOf = (check) => (check.measured === null ? "–" : (UNITS[check.code] || round)(check.measured));
const limitOf = (check) => Object.entries(check.required)
  .map(([kind, value]) => (kind === "min" ? "≥ " : "≤ ") + (UNITS[check.code] || round)(value)).join(", ");
const measureOf = (check) => made("p", "measure", nameOf(check) + ": ", isolated(valueOf(check)), ` (${say("limit")}: `, isolated(limitOf(check)), ")");

// The checks that passed, folded away. One that has passed beyond its limit, because it does not count for this photo, is
// not listed.
function list(of) {
  analysis = of;
  const checks = (of ? of.checks : []).filter(({ passed, measured, required }) => !(passed && (measured > required.max || measured < required.min)));
  const passed = checks.filter((check) => check.passed);
  byId("checks").querySelector("tbody").replaceChildren(...passed.map((check) => {
    const name = made("th", "", nameOf(check));
    name.scope = "row";
    return made("tr", "", name, ...[valueOf(check), limitOf(check)].map((text) => made("td", "number", isolated(text))));
  }));
  byId("checks-summary").replaceChildren(say("passed") + " ", isolated(`${passed.length} / ${checks.length}`));
  byId("checks").hidden = passed.length === 0;
}

// --- what the service says ---

// A sentence of the service in the page's language: it may have been said in another one.
function translated(text, code, from) {
  if (from === language) return text;
  for (const kind of ["messages", "hints"]) {
    const name = Object.keys(TEXTS[from][kind]).find((one) => TEXTS[from][kind][one] === text);
    if (name) return TEXTS[language][kind][name];
  }
  return TEXTS[language].messages[code] || text;
}

// Returns { ok, body, words, busyThere, pause }: what the service answered, its message as a function, and the milliseconds
// that it wants to be left alone.
async function send(route, blob, fields = {}, further = {}, frames = []) {
  const form = new FormData(), key = byId("key").value.trim(), from = language;
  if (blob) form.append("file", blob, "photo.jpg");
  for (const one of frames) form.append("frame", one, "frame.jpg");
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  const headers = { "Accept-Language": from, ...further, ...(key ? { Authorization: "Bearer " + key } : {}) };
  let response, body;
  try {
    response = await fetch(route, { method: "POST", body: form, headers });
    body = { ...(await response.json()), from };
  } catch {
    return { ok: false, body: {}, words: () => say("offline"), pause: OFFLINE_PAUSE_MS };
  }
  const words = () => translated(body.message, body.code, from);
  if (body.code === "unauthorized") {
    byId("more").open = true;
    return { ok: false, body, words: key ? words : () => say("needKey"), pause: OFFLINE_PAUSE_MS };
  }
  const busyThere = response.status === 429 || response.status === 503;
  const wait = busyThere ? Number(response.headers.get("Retry-After")) || 2 : 0;
  const whole = 1000 * wait > LONGEST_RETRY_MS ? () => `${words()} ${say("again")} ${duration(wait)}.` : words;
  return { ok: response.ok, body, words: whole, busyThere, pause: 1000 * wait };
}

function duration(seconds) {
  const [value, unit] = seconds > 90 ? [Math.ceil(seconds / 60), "minute"] : [seconds, "second"];
  return value.toLocaleString(language + "-u-nu-latn", { style: "unit", unit, unitDisplay: "long" });
}

// A person who waits is not sent away for a moment's rush, nor kept waiting for long.
async function sendPatiently(...request) {
  for (let tried = 1; ; tried += 1) {
    const answer = await send(...request);
    if (!answer.busyThere || tried === RETRIES || answer.pause > LONGEST_RETRY_MS) return answer;
    tell("", answer.words);
    await rest(answer.pause);
  }
}

async function showModel() {
  const body = await fetch("/health").then((response) => response.json()).catch(() => ({}));
  byId("model").hidden = body.model !== COMPACT_MODEL;
}

// The first thing to mend, as arguments of `tell`; the others below it.
function advice({ body }) {
  const [first, ...others] = body.checks.filter((check) => !check.passed);
  const hint = (check) => translated(check.hint || body.message, check.code, body.from);
  const further = () => made("ul", "further", ...others.map((check) => made("li", "", hint(check), measureOf(check))));
  return ["bad", () => hint(first), [() => measureOf(first), ...(others.length ? [further] : [])], ["source"]];
}

// --- the camera ---

// Returns whether it runs; if not, the person is told why.
async function startCamera() {
  if (opening) return false;
  if (!navigator.mediaDevices) {
    tell("bad", () => say("insecure"));
    return false;
  }
  opening = true;
  tell("", () => say("asking"));
  try {
    const given = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", width: { ideal: 1280 } } });
    video.srcObject = given;
    await video.play();
    stream = given;
  } catch (error) {
    const known = { NotAllowedError: "denied", SecurityError: "denied", NotReadableError: "inUse", AbortError: "inUse" };
    tell("bad", () => say(known[error.name] || "noCamera"));
    return false;
  } finally {
    opening = false;
  }
  stream.getVideoTracks()[0].addEventListener("ended", () => {
    closeCamera();
    tell("bad", () => say("ended"));
  });
  return true;
}

async function openCamera() {
  if (!(await startCamera())) return;
  forget();
  tell("", () => say("looking"), [line(() => say("takesItself"))]);
  showStage();
  guideAlong(++live);
}

function showStage() {
  stage.scrollIntoView({ block: "nearest" });
}

function closeCamera() {
  live += 1;
  for (const track of stream ? stream.getTracks() : []) track.stop();
  stream = video.srcObject = null;
  refresh();
}

// A phone that is turned turns its frames, too.
video.addEventListener("resize", () => {
  const wide = video.videoWidth, high = video.videoHeight, across = 0.3 * Math.min(wide, 0.9 * high);
  byId("guide").setAttribute("viewBox", `0 0 ${wide} ${high}`);
  for (const one of byId("guide").children)
    for (const [name, value] of Object.entries({ cx: wide / 2, cy: 0.47 * high, rx: across, ry: 1.36 * across })) one.setAttribute(name, value);
});

// The preview is a mirror; what is sent is not.
function frame(longest) {
  const scale = Math.min(1, longest / Math.max(video.videoWidth, video.videoHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(video.videoWidth * scale);
  canvas.height = Math.round(video.videoHeight * scale);
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.9));
}

async function capture() {
  const mine = ++live;  // the guidance is over
  const blob = await frame(TAKEN_SIDE);
  if (mine === live) take(blob, true);
}

// Guide until the photo is taken. One frame is under way at a time, and the pause is as long as its answer took: a camera
// takes half of a core, at most.
async function guideAlong(mine) {
  let told = -READING_MS, goodSince = null;
  while (mine === live) {
    if (document.hidden) {
      goodSince = null;
      await rest(LEAST_PAUSE_MS);
      continue;
    }
    const begun = performance.now();
    const answer = await send("/analyze", await frame(GUIDE_SIDE));
    if (mine !== live) return;
    list(answer.ok ? answer.body : null);
    const good = answer.ok && answer.body.accepted, now = performance.now();
    const news = good ? ["good", () => say("good")] : answer.ok ? advice(answer) : ["bad", answer.words];
    const same = news[1]() === statusLine.textContent;
    if (!answer.ok || same || now - told >= READING_MS) {
      tell(news[0], news[1], (news[2] || []).slice(0, 1));
      if (!same) told = now;
    }
    // The second begins when the person reads that all is good.
    if (!good || shown.mood !== "good") goodSince = null;
    else goodSince ??= now;
    if (goodSince !== null && begun - goodSince >= HOLD_MS) return capture();
    stage.classList.toggle("accepted", shown.mood === "good");
    stage.style.setProperty("--held", goodSince === null ? 0 : Math.min(100, (100 * (now - goodSince)) / HOLD_MS));
    await rest(Math.max(LEAST_PAUSE_MS, performance.now() - begun, answer.pause));
  }
}

// --- one photo ---

function forget() {
  photo = null;
  stage.classList.remove("accepted");
  list(null);
  tell("", () => say("begin"));
}

// Show a photo and have it looked at; `mirrored`: it comes from the camera, and is shown as the preview was.
async function take(blob, mirrored = false) {
  closeCamera();
  forget();
  const mine = (photo = { blob, mirrored, bitmap: null, analysis: null, fit: false, key: newKey() });
  tell("", () => say("looking"));
  // A folder cannot be read at all.
  const readable = await blob.slice(0, 1).arrayBuffer().then((bytes) => bytes.byteLength > 0, () => false);
  if (photo !== mine) return;
  if (!readable || (blob.type && !blob.type.startsWith("image/"))) return tellNoPhoto();
  mine.bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" }).catch(() => null);
  if (photo !== mine) return;
  mine.fit = Boolean(mine.bitmap);
  draw();
  refresh();
  showStage();
  await look();
}

function tellNoPhoto() {
  tell("bad", () => say("noPhoto"), [line(() => say("formats"))], ["source"]);
}

// crypto.randomUUID is for HTTPS alone; this is not.
function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((one) => one.toString(16).padStart(2, "0")).join("");
}

async function look() {
  const mine = photo, turn = ++turns;
  tell("", () => say("looking"));
  const answer = await sendPatiently("/analyze", mine.blob);
  if (photo !== mine) return;
  mine.fit = answer.ok ? answer.body.accepted : ![...NO_PHOTO, ...TOO_LARGE].includes(answer.body.code);
  if (answer.ok) {
    mine.analysis = answer.body;
    list(answer.body);
    draw();
  }
  refresh();
  if (turn !== turns) return;  // the person did not wait for this, and has been told of something else since
  if (NO_PHOTO.includes(answer.body.code)) tellNoPhoto();
  else if (!answer.ok) tell("bad", answer.words, [], mine.fit ? ["sign-up", "verify"] : ["source"]);
  else if (!answer.body.accepted) tell(...advice(answer));
  else tell("good", () => say("ready"), [], ["sign-up", "verify"], "nextPhoto");
}

function draw() {
  const { bitmap, analysis } = photo;
  if (!bitmap) return;
  const scale = Math.min(1, DRAWN_SIDE / Math.max(bitmap.width, bitmap.height));
  picture.width = Math.round(bitmap.width * scale);
  picture.height = Math.round(bitmap.height * scale);
  const context = picture.getContext("2d");
  context.drawImage(bitmap, 0, 0, picture.width, picture.height);
  if (!analysis) return;
  const by = picture.width / analysis.image.width, usual = Math.max(2, Math.max(picture.width, picture.height) / 170);
  const colour = analysis.accepted ? "#63e29c" : "#ffa295";
  for (const face of analysis.faces) {
    const [left, top, right, bottom] = face.box.map((one) => one * by), thick = Math.min(usual, (right - left) / 25);
    for (const [width, style] of [[2.4 * thick, "rgb(0 0 0 / .6)"], [thick, colour]]) {
      context.lineWidth = width;
      context.strokeStyle = style;
      context.beginPath();
      context.roundRect(left, top, right - left, bottom - top, 4 * thick);
      context.stroke();
    }
    for (const [x, y] of face.landmarks)
      for (const [radius, style] of [[2.1 * thick, "rgb(0 0 0 / .75)"], [1.4 * thick, "#fff"]]) {
        context.beginPath();
        context.arc(x * by, y * by, radius, 0, 2 * Math.PI);
        context.fillStyle = style;
        context.fill();
      }
  }
}

// --- what can be done with a photo ---

// Do `work` with the photo, then bring its result to the person: the focus has it read out.
async function act(work) {
  if (busy || !photo || !photo.fit) return;
  busy = true;
  turns += 1;
  tell("", () => say("working"));
  try {
    tell(...(await work()));
  } finally {
    busy = false;
    refresh();
  }
  byId("outcome").focus();
  byId("outcome").scrollIntoView({ block: "nearest" });
}

async function signUp() {
  const answer = await sendProved("/signUp", {}, { "Idempotency-Key": photo.key });
  if (!answer) return notDone("sign-up");
  const { ok, body, words } = answer;
  if (!ok) return refusal(body, words, "notSignedUp", "sign-up");
  photo.key = newKey();
  person = null;
  return ["good", () => say("signedUp"), [userLine(body)], ["source"], "nextSignedUp"];
}

async function verify() {
  const fields = { threshold: western(byId("threshold").value.trim()), user_id: byId("user-id").value.trim() };
  const answer = await sendProved("/verify", fields);
  if (!answer) return notDone("verify");
  const { ok, body, words } = answer;
  person = ok ? body.user_id : null;
  if (!ok) return refusal(body, words, "notVerified", "verify");
  const similarity = () => `${say("similarity")}: ${round(body.similarity)} (${say("needed")}: ${round(body.threshold)})`;
  return ["good", () => say("verified"), [line(similarity), userLine(body)], ["add-photo", "source"], "nextVerified"];
}

// With the photo's key a photo is added once, however often the button is pressed.
async function addPhoto() {
  const route = `/users/${encodeURIComponent(person)}/photos`;
  const answer = await sendProved(route, {}, { "Idempotency-Key": photo.key });
  if (!answer) return notDone("add-photo");
  const { ok, body, words } = answer;
  if (!ok) {
    if (body.code === "unknown_user") person = null;
    const known = { duplicate_face: [["source"], "nextSomebodyElse"], no_match: [["source", "verify"], "nextOtherPerson"] };
    return refusal(body, words, "notAdded", person ? "add-photo" : "verify", known);
  }
  const photos = () => made("p", "", say("photos") + ": ", isolated(body.photos));
  return ["good", () => say("photoAdded"), [photos, userLine(body)], ["source"], "nextPhotoAdded"];
}

// --- a challenge: steps before the camera ---

// Send the photo; if the service or the person wants it, with the frames of a challenge. Returns the answer, or null if
// the steps were not done.
async function sendProved(route, fields, further = {}) {
  const alone = () => sendPatiently(route, photo.blob, fields, further);
  if (!byId("prove").checked) {
    const answer = await alone();
    if (answer.body.code !== "challenge_required") return answer;
    byId("prove").checked = true;
  }
  // The camera comes first: the challenge's time must not pass while the browser asks the person about it.
  if (!(await startCamera())) return null;
  const asked = await sendPatiently("/challenges", null);
  if (!asked.ok) closeCamera();
  if (asked.body.code === "not_found") return alone();
  if (!asked.ok) return asked;
  const frames = await film(asked.body);
  if (!frames) return null;
  tell("", () => say("working"));
  const answer = await sendPatiently(route, photo.blob, { ...fields, challenge_id: asked.body.challenge_id }, further, frames);
  // The service takes challenges, but not here.
  return answer.body.code === "unknown_field" ? alone() : answer;
}

// What the page said last is why, if it was bad: that there is no camera, for example.
function notDone(action) {
  return ["bad", () => say("stepsStopped"), shown.mood === "bad" ? [line(shown.words)] : [], [action]];
}

// Have the person do the steps, each over as soon as a frame shows it, and return the frames: one of each step, and one
// from before it where there is room. Null if the camera is turned off, the time is over, or the face does what was not
// asked for: a film that shows every step at some time would pass otherwise.
async function film({ steps, expires_in: seconds, frames: { max: most } }) {
  const until = performance.now() + 1000 * seconds - SENDING_MS, frames = [];
  if (!stream) return null;  // turned off meanwhile
  const mine = ++live;
  let straight = null, finished = 0;
  showStage();
  for (const [number, step] of steps.entries()) {
    // Who has come closer stays there; who has turned needs a moment to turn back.
    const expected = [step, steps[number - 1], ...(steps.slice(0, number).includes("come_closer") ? ["come_closer"] : [])];
    const ask = () => tell("", () => say(step), [line(() => `${number + 1} / ${steps.length}`)]);
    ask();
    point(step);
    stage.classList.add("accepted");
    stage.style.setProperty("--held", (100 * number) / steps.length);
    let between = null;
    while (finished === number) {
      await rest(STEP_PAUSE_MS);
      if (mine !== live || performance.now() > until) break;
      const blob = await frame(STEP_SIDE), answer = await send("/analyze", blob);
      if (mine !== live) break;
      const face = answer.ok ? measured(answer.body) : null;
      if (!face) {
        tell("bad", answer.ok ? () => say("stepsAlone") : answer.words);
        await rest(answer.pause);
        continue;
      }
      ask();
      if (shows(step, face, straight)) {
        straight ??= face;
        if (between && frames.length + steps.length - number < most) frames.push(between);
        frames.push(blob);
        finished = number + 1;
      } else if (straight) {
        if (ACTIONS.some((one) => !expected.includes(one) && shows(one, face, straight))) break;
        between = blob;
      }
    }
    if (finished === number) break;
  }
  point("");
  stage.classList.remove("accepted");
  closeCamera();
  return finished === steps.length ? frames : null;
}

// By how many degrees the head is turned to the person's left, and the size of the face in pixels; null unless there is one
// face whose turn is known. The service tells no side: the nose stands to the right of the picture when it is the left.
function measured({ faces, checks }) {
  const turned = checks.find((check) => check.code === "head_turned");
  if (faces.length !== 1 || !turned) return null;
  const [left, right, nose, ...mouth] = faces[0].landmarks, middle = (one, other) => [(one[0] + other[0]) / 2, (one[1] + other[1]) / 2];
  const between = [right[0] - left[0], right[1] - left[1]], centre = middle(left, right), lips = middle(...mouth);
  const aside = (nose[0] - centre[0]) * between[0] + (nose[1] - centre[1]) * between[1];
  const size = Math.max(Math.hypot(...between), Math.hypot(lips[0] - centre[0], lips[1] - centre[1]));
  return { turn: Math.sign(aside) * turned.measured, size };
}

// The service asks for less than this: a step that the page takes for done is done.
function shows(step, { turn, size }, straight) {
  const turned = turn - (straight ? straight.turn : 0);
  if (step === "look_straight") return Math.abs(turned) <= (straight ? STRAIGHT_DEG : FIRST_DEG);
  if (step === "come_closer") return Math.abs(turned) <= STRAIGHT_DEG && size >= CLOSER * straight.size;
  return (step === "turn_left" ? Math.min(turn, turned) : -Math.max(turn, turned)) >= TURNED_DEG;
}

// The preview is a mirror: the arrow points to where the person sees the head turn.
function point(step) {
  const [, , wide, high] = (byId("guide").getAttribute("viewBox") || "0 0 3 4").split(" ").map(Number);
  const x = wide / 2, y = 0.47 * high, by = 0.3 * Math.min(wide, 0.9 * high);
  const strokes = { turn_left: [[-0.2, 0], [-1, 0], [-0.65, -0.35], [-1, 0], [-0.65, 0.35]],
    turn_right: [[0.2, 0], [1, 0], [0.65, -0.35], [1, 0], [0.65, 0.35]],
    look_straight: [[-0.04, 0], [0.04, 0]],
    come_closer: [[0, 0.2], [0, 1.1], [-0.35, 0.75], [0, 1.1], [0.35, 0.75]] }[step] || [];
  const drawn = strokes.map(([right, down], at) => `${at ? "L" : "M"}${x + right * by} ${y + down * by}`).join(" ");
  for (const one of document.querySelectorAll(".arrow")) one.setAttribute("d", drawn);
}

const NEXT_AFTER = { duplicate_face: [["verify"], "nextDuplicate"], no_match: [["sign-up", "source"], "nextNoMatch"] };

// What `tell` says of a request that was refused. `known` has the next steps after some codes, and the text that says them.
// After another failure that is not the photo's, the next step is the same `action` again.
function refusal(body, words, heading, action, known = NEXT_AFTER) {
  if (body.checks) {
    // The photo is not at fault for what the steps before the camera showed.
    const failed = body.checks.find((check) => !check.passed), ofSteps = [...ABOUT_STEPS, "not_live"].includes(failed.code);
    photo.fit = ofSteps && byId("prove").checked;
    list(body);
    return photo.fit ? [...advice({ body }).slice(0, 3), [action]] : advice({ body });
  }
  return ["bad", () => say(heading), [line(words)], ...(known[body.code] || [[action]])];
}

function userLine(body) {
  return () => {
    const button = made("button", ""), words = made("span", "", say("copy"));
    words.setAttribute("role", "status");
    button.type = "button";
    button.id = "copy";
    button.append(words);
    const id = isolated(body.user_id);
    button.addEventListener("click", async () => {
      if (await copy(id)) words.textContent = say("copied");
      await rest(COPIED_MS);
      words.textContent = say("copy");
    });
    return made("div", "user", made("span", "", say("user") + ":"), id, button);
  };
}

// Without HTTPS a browser has no clipboard, but copies what is selected.
async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}

// An Arabic keyboard's digits and decimal separator, as the service reads numbers.
function western(text) {
  return text.replace(/[٠-٩]/g, (digit) => digit.charCodeAt(0) - 0x660).replace("٫", ".");
}

// --- what the person does ---

byId("language").addEventListener("click", () => {
  language = otherLanguage();
  remember("localStorage", "language", language);
  translate();
});
byId("camera").addEventListener("click", () => {
  if (!stream) return openCamera();
  closeCamera();
  if (!busy) forget();
});
byId("capture").addEventListener("click", capture);
byId("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) take(file);
  event.target.value = "";
});
for (const name of ["dragover", "dragleave", "drop"])
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    stage.classList.toggle("dropping", name === "dragover" && !busy);
    const [file] = event.dataTransfer.files;
    if (name === "drop" && file && !busy) take(file);
  });
byId("sign-up").addEventListener("click", () => act(signUp));
byId("verify").addEventListener("click", () => act(verify));
byId("add-photo").addEventListener("click", () => act(addPhoto));
byId("key").value = recall("sessionStorage", "key") || "";
byId("key").addEventListener("change", (event) => {
  remember("sessionStorage", "key", event.target.value.trim());
  if (photo) look();
});
translate();
showModel();
