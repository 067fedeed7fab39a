// The page of `rolldiff serve`. It speaks the server's own wire, OpenAI's image events, and asks no
// other host for anything. `client` reads events, `sent` shows them as they come, `pretended`
// animates the same frames, `masking` draws what is decoded again.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["num_groups", "overlap", "steps", "seed"];

let model = null; // what the server says of its model
let frames = []; // of the last decoding: {image, url, blob, rolldiff, ms}
let asked = null; // the fields of the last decoding, and for an edit its files
let matrix = null; // of the last decoding
let shown = -1; // the frame on the left
let stopping = null; // an AbortController while a decoding runs
let paused = false;

// ---------------------------------------------------------------------------------------------
// The wire

function headers(more = {}) {
  const key = $("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

function post(fields, files, signal) {
  if (!files) {
    const body = JSON.stringify(fields);
    return fetch("v1/images/generations", {
      method: "POST", body, signal, headers: headers({ "Content-Type": "application/json" }),
    });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  for (const [name, file] of Object.entries(files)) form.append(name, file, `${name}.png`);
  return fetch("v1/images/edits", { method: "POST", body: form, signal, headers: headers() });
}

async function checked(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = `${response.status} ${response.statusText}`;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* not an answer of the server itself */ }
  throw new Error(message);
}

// The data of server-sent events, one by one.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

// ---------------------------------------------------------------------------------------------
// Settings

function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
  if (values.map(String).includes(String(chosen))) select.value = chosen;
}

async function load() {
  const found = await (await checked(await fetch("v1/models", { headers: headers() }))).json();
  model = found.data[0];
  const about = model.rolldiff;
  const classes = about.classes.slice(0, 2000);
  const select = $("class");
  select.replaceChildren(...classes.map((name) => new Option(name, name)));
  if (about.no_class && classes.length) select.append(new Option("none", ""));
  $("class-field").hidden = !classes.length;
  $("prompt-field").hidden = !about.prompts.length;
  $("prompts").replaceChildren(...about.prompts.map((text) => new Option(text, text)));
  $("guidance-field").hidden = !classes.length || !about.no_class;
  options($("num_groups"), about.num_groups, about.defaults.num_groups);
  options($("order"), about.orders, about.defaults.order);
  $("steps").value = about.defaults.steps;
  $("overlap").value = about.defaults.overlap;
  $("overlap-value").value = about.defaults.overlap;
  $("frames").max = about.limits.partial_images + 1;
  $("frames").value = Math.min(5, about.limits.partial_images + 1);
  $("size-field").hidden = !about.any_size;
  $("edit-section").hidden = !about.edits;
  document.title = `rolldiff: ${model.id}`;
}

function settings() {
  const fields = {
    model: model.id,
    prompt: ($("prompt-field").hidden ? "" : $("prompt").value.trim()) || $("class").value,
    order: $("order").value,
    partial_images: Number($("frames").value) - 1,
  };
  for (const name of NUMBERS) fields[name] = Number($(name).value);
  if (!$("size-field").hidden) fields.size = $("size").value;
  const guidance = Number($("guidance").value);
  if (!$("guidance-field").hidden && fields.prompt && guidance !== 1) fields.guidance_scale = guidance;
  return fields;
}

// ---------------------------------------------------------------------------------------------
// A decoding

async function decode(fields, files) {
  if (stopping) stopping.abort();
  const mine = (stopping = new AbortController());
  fail("");
  for (const frame of frames) URL.revokeObjectURL(frame.url);
  frames = [];
  asked = { fields, files };
  shown = -1;
  setPaused(false);
  masking.off();
  $("strip").replaceChildren();
  enable();
  try {
    const start = performance.now();
    const response = await checked(await post({ ...fields, stream: true }, files, mine.signal));
    schedule(fields, Boolean(files));
    for await (const data of events(response)) {
      if (data.error) throw new Error(data.error.message);
      const ms = performance.now() - start;
      const blob = new Blob([bytes(data.b64_json)], { type: "image/png" });
      const image = await createImageBitmap(blob);
      if (stopping !== mine) return;
      add({ image, blob, url: URL.createObjectURL(blob), rolldiff: data.rolldiff, ms });
    }
    if (frames.at(-1)?.rolldiff.tau !== 0) throw new Error("The server ended before the image did.");
    pretended.start();
  } catch (error) {
    if (stopping === mine) fail(mine.signal.aborted ? "Stopped." : error.message);
  } finally {
    if (stopping === mine) stopping = null;
    enable();
  }
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function enable() {
  const finished = frames.length > 0 && frames.at(-1).rolldiff.tau === 0;
  const busy = Boolean(stopping);
  $("stop").disabled = !busy;
  for (const id of ["pause", "replay", "save-png", "save-gif", "draw"]) $(id).disabled = busy || !finished;
  if (busy) $("pause").disabled = false;
  masking.enable();
}

function add(frame) {
  frames.push(frame);
  const number = frames.length;
  const picture = new Image();
  picture.src = frame.url;
  picture.alt = describe(number - 1);
  const button = document.createElement("button");
  button.type = "button";
  button.append(picture);
  button.addEventListener("click", () => {
    setPaused(true);
    show(number - 1);
  });
  const item = document.createElement("li");
  item.append(button);
  $("strip").append(item);
  if (!paused) show(number - 1);
}

function describe(index) {
  const { rolldiff } = frames[index];
  const rows = `${rolldiff.finished_rows} of ${frames[index].image.height} rows final`;
  return `Frame ${index + 1}: ${rows}`;
}

// ---------------------------------------------------------------------------------------------
// What the server sends

function show(index) {
  const frame = frames[index];
  shown = index;
  const { width, height } = frame.image;
  for (const box of document.querySelectorAll(".picture")) box.style.aspectRatio = `${width} / ${height}`;
  const canvas = $("sent");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(frame.image, 0, 0);
  canvas.setAttribute("aria-label", describe(index));
  const { tau, nfe, finished_rows, finished, warnings } = frame.rolldiff;
  $("line").hidden = finished_rows === 0 || finished_rows === height;
  $("line").style.top = `${(100 * finished_rows) / height}%`;
  const percent = Math.round(100 * finished);
  const texts = [
    describe(index), `${percent} % of the pixels final`, `tau ${tau.toFixed(2)}`, `${nfe} network calls`,
    `${Math.round(frame.ms)} ms`, `seed ${frame.rolldiff.seed}`,
  ];
  $("status").textContent = texts.join(", ") + (warnings ? `. Not trained for: ${warnings.join("; ")}` : "");
  [...$("strip").querySelectorAll("button")].forEach((button, i) => {
    button.setAttribute("aria-current", String(i === index));
  });
  drawMatrix();
}

async function schedule(fields, edit) {
  matrix = null;
  $("matrix").hidden = edit;
  $("matrix-edit").hidden = !edit;
  // An edit's groups are those of the masked tokens, which the server alone knows.
  if (!edit) {
    const names = ["num_groups", "overlap", "steps", "order", "size"].filter((name) => name in fields);
    const query = new URLSearchParams(names.map((name) => [name, fields[name]]));
    const response = await fetch(`v1/schedule?${query}`, { headers: headers() });
    matrix = response.ok ? (await response.json()).matrix : null;
  }
  drawMatrix();
}

function drawMatrix() {
  const canvas = $("matrix");
  const context = canvas.getContext("2d");
  if (!matrix) {
    context.clearRect(0, 0, canvas.width, canvas.height);
    return;
  }
  const steps = matrix.length - 1;
  const done = shown < 0 ? 0 : Math.round((1 - frames[shown].rolldiff.tau) * steps);
  canvas.width = matrix.length;
  canvas.height = matrix[0].length;
  matrix.forEach((row, step) => row.forEach((t, group) => {
    const light = Math.round(30 + 210 * (1 - t));
    context.globalAlpha = step <= done ? 1 : 0.18;
    context.fillStyle = `rgb(${light - 20}, ${light}, ${Math.min(255, light + 15)})`;
    context.fillRect(step, group, 1, 1);
  }));
  const label = `Scheduling matrix of ${canvas.height} groups: step ${done} of ${steps}`;
  canvas.setAttribute("aria-label", label);
}

// The frames again, at the pace at which they came, but in three seconds at least.
let replaying = 0;
async function replay() {
  setPaused(false);
  const mine = ++replaying;
  const pace = Math.max(1, 3000 / Math.max(1, frames.at(-1).ms));
  pretended.start();
  let before = 0;
  for (let i = 0; i < frames.length; i++) {
    let left = pace * (frames[i].ms - before);
    before = frames[i].ms;
    while (left > 0 || paused) {
      await new Promise((resolve) => setTimeout(resolve, 20));
      if (mine !== replaying || stopping) return;
      if (!paused) left -= 20;
    }
    show(i);
  }
}

function setPaused(value) {
  paused = value;
  $("pause").textContent = paused ? "Go on" : "Pause";
  if (!paused && stopping && frames.length) show(frames.length - 1);
}

// ---------------------------------------------------------------------------------------------
// What a front end could pretend: a line moves down over frames that are blurred below it

const pretended = {
  progress: 1,
  last: 0,
  running: false,

  start() {
    this.progress = 0;
    this.last = performance.now();
    if (!this.running) {
      this.running = true;
      requestAnimationFrame((now) => this.tick(now));
    }
  },

  tick(now) {
    // The first frame's time may be before the start.
    const passed = paused ? 0 : Math.max(0, now - this.last);
    this.last = now;
    this.progress = Math.min(1, this.progress + passed / (1000 * Number($("seconds").value)));
    this.draw();
    this.running = this.progress < 1;
    if (this.running) requestAnimationFrame((next) => this.tick(next));
  },

  draw() {
    if (!frames.length) return;
    const index = Math.min(frames.length - 1, Math.floor(this.progress * frames.length));
    const { image } = frames[index];
    const canvas = $("pretended");
    const scale = Math.max(1, Math.floor(512 / Math.max(image.width, image.height)));
    const [width, height] = [image.width * scale, image.height * scale];
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    const part = Number($("blur").value) / 100;
    // The sharp picture fades out over the blur height, which ends at the line that has moved down.
    const bottom = this.progress * height * (1 + part);
    const top = bottom - part * height;
    const fade = context.createLinearGradient(0, top, 0, Math.max(bottom, top + 1));
    fade.addColorStop(0, "#000f");
    fade.addColorStop(1, "#0000");
    context.drawImage(image, 0, 0, width, height);
    context.globalCompositeOperation = "destination-in";
    context.fillStyle = fade;
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.filter = `blur(${Math.round(height / 16)}px)`;
    context.drawImage(image, 0, 0, width, height);
    context.filter = "none";
    context.drawImage(image, 0, 0, width, height); // under the edges, where the blur is transparent
    const label = `Animation at ${Math.round(100 * this.progress)} %, of frame ${index + 1}`;
    canvas.setAttribute("aria-label", label);
  },
};

// ---------------------------------------------------------------------------------------------
// Masks

const masking = {
  at: [0.5, 0.5], // of the brush, as parts of width and height
  painting: false,

  get active() {
    return !$("mask").hidden;
  },

  on() {
    const { width, height } = frames.at(-1).image;
    show(frames.length - 1);
    const canvas = $("mask");
    canvas.width = width;
    canvas.height = height;
    canvas.hidden = false;
    canvas.tabIndex = 0;
    canvas.focus();
    $("draw").setAttribute("aria-pressed", "true");
    this.enable();
  },

  off() {
    $("mask").hidden = true;
    $("mask").tabIndex = -1;
    $("draw").setAttribute("aria-pressed", "false");
    this.enable();
  },

  enable() {
    const ready = this.active && !stopping;
    $("clear").disabled = !ready;
    $("redraw").disabled = !ready;
  },

  paint() {
    const canvas = $("mask");
    const context = canvas.getContext("2d");
    const side = Math.max(1, Math.round((Number($("brush").value) / 100) * canvas.width));
    const left = Math.floor(this.at[0] * canvas.width - side / 2 + 0.5);
    const top = Math.floor(this.at[1] * canvas.height - side / 2 + 0.5);
    context.fillStyle = "#e0218a";
    context.fillRect(left, top, side, side);
  },

  clear() {
    const canvas = $("mask");
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  },

  pointer(event) {
    const box = $("mask").getBoundingClientRect();
    this.at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    this.paint();
  },

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      this.at = this.at.map((part, i) => Math.min(1, Math.max(0, part + moves[event.key][i] / 16)));
      if (event.shiftKey) this.paint();
    } else if (event.key === " ") {
      this.paint();
    } else if (event.key === "Escape") {
      this.clear();
    } else {
      return;
    }
    const [x, y] = this.at.map((part) => Math.round(100 * part));
    $("status").textContent = `Brush at ${x} % from the left, ${y} % from the top`;
    event.preventDefault();
  },

  // A PNG that is transparent where the mask was painted; null if nothing was.
  async file() {
    const drawn = $("mask");
    const canvas = new OffscreenCanvas(drawn.width, drawn.height);
    const context = canvas.getContext("2d");
    context.drawImage(drawn, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    let painted = false;
    for (let i = 3; i < pixels.data.length; i += 4) {
      painted ||= pixels.data[i] > 0;
      pixels.data[i] = pixels.data[i] > 0 ? 0 : 255;
    }
    context.putImageData(pixels, 0, 0);
    return painted ? canvas.convertToBlob({ type: "image/png" }) : null;
  },
};

async function redraw() {
  // The mask takes a moment to make, in which nothing else may begin and the old image is no result.
  for (const id of ["redraw", "save-png", "save-gif"]) $(id).disabled = true;
  const mask = await masking.file();
  enable();
  if (!mask) {
    fail("Paint the part that is decoded again first.");
    return;
  }
  newSeed();
  const fields = settings();
  delete fields.size;
  await decode(fields, { image: frames.at(-1).blob, mask });
}

// ---------------------------------------------------------------------------------------------
// Files

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The server makes the film: the same seed and settings give the same frames.
async function saveGif() {
  fail("");
  try {
    const { fields, files } = asked;
    const response = await checked(await post({ ...fields, output_format: "gif" }, files));
    const data = (await response.json()).data[0].b64_json;
    save(new Blob([bytes(data)], { type: "image/gif" }), "rolldiff.gif");
  } catch (error) {
    fail(error.message);
  }
}

function newSeed() {
  if ($("new-seed").checked) $("seed").value = Math.floor(Math.random() * 2 ** 31);
}

// ---------------------------------------------------------------------------------------------

$("settings").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!model) {
    try {
      await load();
    } catch (error) {
      fail(error.message);
      return;
    }
  }
  newSeed();
  decode(settings(), null);
});
$("stop").addEventListener("click", () => stopping?.abort());
$("overlap").addEventListener("input", () => ($("overlap-value").value = $("overlap").value));
$("blur").addEventListener("input", () => {
  $("blur-value").value = `${$("blur").value} %`;
  pretended.draw();
});
$("seconds").addEventListener("input", () => ($("seconds-value").value = $("seconds").value));
$("pause").addEventListener("click", () => setPaused(!paused));
$("replay").addEventListener("click", replay);
$("save-png").addEventListener("click", () => save(frames.at(-1).blob, "rolldiff.png"));
$("save-gif").addEventListener("click", saveGif);
$("draw").addEventListener("click", () => (masking.active ? masking.off() : masking.on()));
$("clear").addEventListener("click", () => masking.clear());
$("redraw").addEventListener("click", redraw);
$("mask").addEventListener("keydown", (event) => masking.key(event));
$("mask").addEventListener("pointerdown", (event) => {
  $("mask").setPointerCapture(event.pointerId);
  masking.painting = true;
  masking.pointer(event);
});
$("mask").addEventListener("pointermove", (event) => masking.painting && masking.pointer(event));
$("mask").addEventListener("pointerup", () => (masking.painting = false));
$("key").addEventListener("change", () => load().then(() => fail(""), (error) => fail(error.message)));
load().catch((error) => fail(error.message));
