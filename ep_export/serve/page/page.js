// The page at /: asks the server the way any OpenAI client would, and draws what pruning kept.

const $ = (id) => document.getElementById(id);
const SENT_AS_IT_IS = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff"]);
const LARGEST_FILE = 6 << 20; // larger ones, and kinds the server does not read, are drawn anew
const LONGEST_SIDE = 2048;

const state = {
  key: "",
  model: null, // as /v1/models lists it
  adaptive: false, // every picture has its own keep, which the bundle knows
  picture: null, // {bitmap, url, name}
  kept: null, // `ep_export` of the pruned answer
  shown: -1, // the cut that is drawn; -1: the picture as it is
  unpruned: new Map(), // question -> what was measured, for this picture
  asking: null, // AbortController
};

// ---- the server

function headers() {
  return { "Content-Type": "application/json", ...(state.key && { Authorization: `Bearer ${state.key}` }) };
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answers with ${response.status}`);
}

async function loadModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  $("key-form").hidden = response.status !== 401;
  if (response.status === 401) {
    $("key").focus();
    if (state.key) throw await refusal(response);
    return;
  }
  if (!response.ok) throw await refusal(response);
  state.model = (await response.json()).data[0];
  showModel(state.model);
  enable();
}

function showModel({ id, ep_export: about }) {
  document.title = `${id} · ep-export`;
  $("model").textContent = id;
  const cuts = about.cuts.map((cut) => cut.layer).join(" and ");
  $("about").textContent = `${about.layers} layers, pruned at layer ${cuts}. Ask about a picture and see what is kept of it.`;
  const keep = $("keep");
  keep.min = Math.min(0.99, Math.ceil(about.smallest_keep * 100) / 100 || 0.01);
  keep.max = 1;
  keep.value = about.keep.ratio ?? 0.25;
  state.adaptive = about.keep.adaptive; // until the knob is moved
  const own = new Set(about.cuts.map((cut) => cut.policy));
  const names = [...about.policies];
  $("policy").replaceChildren(
    ...(own.size > 1 ? [new Option("as built", "")] : []),
    ...names.map((name) => new Option(name, name, own.size === 1 && own.has(name), own.size === 1 && own.has(name))),
  );
  showKeep();
}

// One answer as it comes; `onText` gets all text so far. Resolves to what was measured.
async function ask(extra, signal, onText) {
  const content = [{ type: "text", text: $("question").value.trim() }];
  if (state.picture) content.unshift({ type: "image_url", image_url: { url: state.picture.url } });
  const body = JSON.stringify({
    model: state.model.id, messages: [{ role: "user", content }],
    stream: true, stream_options: { include_usage: true }, ...extra,
  });
  const began = performance.now();
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal });
  if (!response.ok) throw await refusal(response);
  const measured = { text: "", firstMs: null, finish: null, kept: null, usage: null };
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice?.delta.content) {
      measured.firstMs ??= performance.now() - began;
      measured.text += choice.delta.content;
      onText(measured.text);
    }
    if (choice?.finish_reason) [measured.finish, measured.kept] = [choice.finish_reason, event.ep_export];
    if (event.usage) measured.usage = event.usage;
  }
  if (!measured.finish) throw new Error("the connection ended before the answer did");
  return measured;
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += decoder.decode(value, { stream: true });
    const whole = waiting.split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// ---- asking

function pruning() {
  const policy = $("policy").value;
  // a policy that keeps nothing has no amount
  const amount = policy !== "nothing" && !state.adaptive && { keep: Number($("keep").value) };
  return { ...(policy && { policy }), ...amount };
}

async function run() {
  if (!state.model || !$("form").reportValidity()) return;
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  say("");
  $("stop").hidden = false;
  try {
    const pruned = await answer("pruned", pruning(), asking.signal);
    if (pruned.kept.keep.adaptive) part("pruned", "how").textContent = adaptiveText(pruned);
    state.kept = pruned.kept;
    showViews();
    const question = $("question").value.trim();
    let full = state.unpruned.get(question);
    showFigures(pruned, full);
    if (full) {
      showAnswer("unpruned", full);
    } else {
      full = await answer("unpruned", { prune: false }, asking.signal);
      state.unpruned.set(question, full);
      showFigures(pruned, full);
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  } finally {
    if (state.asking === asking) {
      state.asking = null;
      $("stop").hidden = true;
    }
    for (const text of document.querySelectorAll("[aria-busy]")) {
      if (!state.asking) text.removeAttribute("aria-busy");
    }
  }
}

async function answer(id, extra, signal) {
  const text = part(id, "text");
  text.textContent = "";
  part(id, "end").textContent = "";
  part(id, "how").textContent = id === "pruned" && extra.keep ? `keep ${percent(extra.keep)}` : "";
  text.setAttribute("aria-busy", "true");
  const measured = await ask(extra, signal, (told) => (text.textContent = told));
  text.removeAttribute("aria-busy");
  showAnswer(id, measured);
  return measured;
}

const part = (id, what) => $(id).querySelector(`[data-what="${what}"]`);

function showAnswer(id, { text, finish, usage }) {
  part(id, "text").textContent = text || "(no words)";
  const cut = finish === "length" ? ", cut off at the longest answer" : "";
  part(id, "end").textContent = `${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"}${cut}`;
}

function adaptiveText({ kept, usage }) {
  const { kept_visual_tokens, visual_tokens } = usage.prompt_tokens_details;
  const here = `${kept_visual_tokens.at(-1) ?? visual_tokens} of ${visual_tokens} visual tokens`;
  return `keep adaptive, ${percent(kept.keep.ratio)} on average: here ${here}`;
}

function showFigures(pruned, full) {
  const visual = pruned.usage.prompt_tokens_details.visual_tokens;
  const kept = pruned.usage.prompt_tokens_details.kept_visual_tokens;
  const rows = [
    ["First token", [pruned.firstMs, full?.firstMs], (ms) => `${ms < 100 ? ms.toFixed(1) : Math.round(ms)} ms`],
    ["Cache", [pruned.kept.cache_bytes, full?.kept.cache_bytes ?? pruned.kept.cache_bytes_unpruned], bytes],
    ["Visual tokens kept", [kept.at(-1) ?? visual, visual], String],
  ];
  $("figures").querySelector("tbody").replaceChildren(...rows.map(row));
  $("figures").hidden = false;
}

function row([title, values, write]) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = title;
  const largest = Math.max(...values.filter((value) => value != null));
  const cells = values.map((value) => {
    const cell = document.createElement("td");
    cell.textContent = value == null ? "…" : write(value);
    if (value != null) {
      const bar = document.createElement("progress");
      bar.className = "bar";
      [bar.max, bar.value] = [largest || 1, value];
      bar.setAttribute("aria-hidden", "true"); // the number says it
      cell.append(bar);
    }
    return cell;
  });
  line.append(head, ...cells);
  return line;
}

const percent = (share) => `${Math.round(share * 100)}\u00a0%`;

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${count.toFixed(count < 10 && unit ? 2 : 0)} ${units[unit]}`;
}

function say(message) {
  $("alert").textContent = message;
  $("alert").hidden = !message;
}

function enable() {
  $("ask").disabled = !(state.model && $("question").value.trim());
}

function showKeep() {
  const nothing = $("policy").value === "nothing";
  $("keep").disabled = nothing;
  const share = `${state.adaptive ? "adaptive, on average " : ""}${percent($("keep").value)}`;
  $("keep-shown").textContent = nothing ? "none" : share;
  $("keep").setAttribute("aria-valuetext", share);
}

// ---- the picture

async function take(file) {
  if (!file) return;
  say("");
  try {
    const bitmap = await createImageBitmap(file); // upright, as the server turns it
    const asItIs = SENT_AS_IT_IS.has(file.type) && file.size <= LARGEST_FILE;
    const sent = asItIs ? { bitmap, blob: file } : await drawnAnew(bitmap);
    state.picture = { bitmap: sent.bitmap, url: await dataUrl(sent.blob) };
  } catch {
    say(`${file.name || "this"} is not a picture this browser can read`);
    return;
  }
  state.asking?.abort();
  [state.kept, state.shown] = [null, -1];
  state.unpruned.clear();
  $("file-name").textContent = file.name ?? "";
  $("empty").hidden = true;
  $("canvas").hidden = false;
  showViews();
}

async function drawnAnew(bitmap) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  return { bitmap: await createImageBitmap(blob), blob };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// A button for the picture itself and for every cut.
function showViews() {
  const cuts = state.picture && state.kept ? state.kept.cuts : [];
  if (cuts.length) state.shown = state.shown < 0 ? cuts.length - 1 : Math.min(state.shown, cuts.length - 1);
  const choices = [["Picture", -1], ...cuts.map((cut, number) => [`From layer ${cut.layer}`, number])];
  $("views").hidden = !cuts.length;
  $("views").replaceChildren(
    $("views").querySelector("legend"),
    ...choices.map(([title, number]) => {
      const label = document.createElement("label");
      const radio = document.createElement("input");
      [radio.type, radio.name, radio.value] = ["radio", "view", number];
      radio.checked = number === state.shown;
      radio.addEventListener("change", () => {
        state.shown = number;
        draw();
      });
      label.append(radio, title);
      return label;
    }),
  );
  draw();
}

// As the drawings of `ep-export run --show`: what is dropped grey and dim, a bright line round what is kept.
function draw() {
  if (!state.picture) return;
  const { bitmap } = state.picture;
  const drawn = state.shown >= 0 && state.kept?.pictures[0];
  const view = (drawn && drawn.view) || [0, 0, bitmap.width, bitmap.height];
  const left = Math.min(0, view[0]), top = Math.min(0, view[1]);
  const width = Math.max(bitmap.width, view[2]) - left, height = Math.max(bitmap.height, view[3]) - top;
  const scale = Math.min(4, Math.max(1, 960 / Math.max(width, height)));
  const canvas = $("canvas"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
  context.drawImage(bitmap, 0, 0);
  let label = `The picture, ${bitmap.width} by ${bitmap.height} pixels`;
  if (drawn) {
    const kept = new Set(drawn.kept_by_cut[state.shown]);
    drawKept(context, drawn.grid, view, kept, scale);
    const cut = state.kept.cuts[state.shown];
    label += `; ${kept.size} of ${drawn.grid[0] * drawn.grid[1]} patches go on from layer ${cut.layer}, chosen by ${cut.policy}`;
  }
  canvas.setAttribute("aria-label", label);
}

function drawKept(context, [rows, columns], [left, top, right, bottom], kept, scale) {
  const width = (right - left) / columns, height = (bottom - top) / rows;
  const dropped = new Path2D(), edge = new Path2D(), grid = new Path2D();
  const goesOn = (r, c) => r >= 0 && r < rows && c >= 0 && c < columns && kept.has(r * columns + c);
  const line = (path, x0, y0, x1, y1) => {
    path.moveTo(x0, y0);
    path.lineTo(x1, y1);
  };
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const x = left + c * width, y = top + r * height;
      if (!goesOn(r, c)) {
        dropped.rect(x, y, width, height);
        continue;
      }
      if (!goesOn(r - 1, c)) line(edge, x, y, x + width, y);
      if (!goesOn(r + 1, c)) line(edge, x, y + height, x + width, y + height);
      if (!goesOn(r, c - 1)) line(edge, x, y, x, y + height);
      if (!goesOn(r, c + 1)) line(edge, x + width, y, x + width, y + height);
    }
  }
  for (let r = 1; r < rows; r++) line(grid, left, top + r * height, right, top + r * height);
  for (let c = 1; c < columns; c++) line(grid, left + c * width, top, left + c * width, bottom);
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fill(dropped);
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "rgb(16 22 34 / 70%)";
  context.fill(dropped);
  context.strokeStyle = "rgb(255 255 255 / 13%)";
  context.lineWidth = 1 / scale;
  context.stroke(grid);
  context.strokeStyle = "#ffbe3c";
  context.lineWidth = 2.5 / scale;
  context.lineCap = "square";
  context.stroke(edge);
}

// ---- what a person does

let soon = 0;
function again() {
  showKeep();
  clearTimeout(soon);
  // only what was asked before is asked again by moving a knob
  if (state.kept) soon = setTimeout(run, 150);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("question").addEventListener("input", enable);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
$("keep").addEventListener("input", () => {
  state.adaptive = false;
  showKeep();
});
$("keep").addEventListener("change", again);
$("policy").addEventListener("change", again);
$("stop").addEventListener("click", () => state.asking?.abort());
for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
}
$("stage").addEventListener("click", () => $("file").click());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) take(file);
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  say("");
  loadModel().catch((error) => say(error.message));
});

loadModel().catch((error) => say(error.message));
