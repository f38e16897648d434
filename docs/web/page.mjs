// The page: takes frames from camera or video, hands them to the worker, shows what comes back over a background.

const $ = id => document.getElementById(id);
const player = $("player"), view = $("view"), paint = view.getContext("2d");
const input = document.createElement("canvas"), person = document.createElement("canvas");
const small = document.createElement("canvas");
const read = input.getContext("2d", { willReadFrequently: true }), layer = person.getContext("2d");
const SPEED_FRAMES = 10;              // frames that the shown speed is a mean over
const BLUR = 8;                       // how much smaller the frame is drawn, and over how many pixels blurred

let worker, model, picture, paused = false, running = false, asking, finished = [];

// ------------------------------------------------------------------------------------------------- model

function say(text, error = false) {
    $("message").textContent = text;
    $("message").className = error ? "error" : "";
}

const fail = (what, error) => say(`${what}: ${error.message ?? error}`, true);

// One question at a time: the next message of the worker is the answer.
function ask(message, transfer = []) {
    return new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => data.error ? reject(new Error(data.error)) : resolve(data);
        worker.onerror = event => reject(new Error(event.message ?? "the worker could not be started"));
        worker.postMessage(message, transfer);
    });
}

async function load(bytes, name) {
    await stop();
    model = undefined;
    enable();
    say(`Loading ${name} …`);
    const megabytes = (bytes.byteLength / 1e6).toFixed(2);
    const threads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency ?? 1) : 1;
    try {
        worker?.terminate();
        worker = new Worker("worker.mjs", { type: "module" });
        model = (await ask({ model: bytes, threads }, [bytes])).ready;
    } catch (error) {
        $("about").textContent = "none yet";
        return fail(`${name} cannot be used`, error);
    }
    for (const canvas of [view, input, person]) [canvas.width, canvas.height] = [model.width, model.height];
    [small.width, small.height] = [model.width, model.height].map(n => Math.ceil(n / BLUR));
    $("about").textContent = `${name}: ${megabytes} MB, ${model.bits}, ${model.width}x${model.height}, `
        + `${model.states} states, ${model.threads} thread${model.threads > 1 ? "s" : ""}`;
    enable();
    say("Ready. Start the camera or choose a video.");
    if (player.srcObject || player.src) run();
}

function enable() {
    for (const id of ["camera", "video"]) $(id).disabled = !model;
    $("pause").disabled = !model || !(player.srcObject || player.src);
}

// -------------------------------------------------------------------------------------------------- clip

async function start(open, what) {
    await stop();
    try {
        player.srcObject?.getTracks().forEach(track => track.stop());
        player.srcObject = null;
        player.removeAttribute("src");
        await open();
        await player.play();
    } catch (error) {
        player.srcObject = null;
        player.removeAttribute("src");
        enable();
        return fail(`${what} cannot be played`, error);
    }
    enable();
    setPaused(false);
    say(`Matting ${what}.`);
    run();
}

const openCamera = async () => {
    if (!navigator.mediaDevices) throw new Error("browsers hand out the camera on https and on localhost only");
    player.srcObject = await navigator.mediaDevices.getUserMedia({ video: true, audio: false });
    player.srcObject.getTracks()[0].addEventListener("ended", () => say("The camera has gone.", true));
};

const openVideo = file => async () => {
    player.src = URL.createObjectURL(file);
};

function setPaused(value) {
    paused = value;
    $("pause").setAttribute("aria-pressed", String(paused));
    $("pause").textContent = paused ? "Go on" : "Pause";
    if (paused) player.pause(); else player.play();
}

// Draw what fills the canvas, its shape kept; what stands over is cut off on both sides.
function cover(context, source, width, height) {
    const { width: w, height: h } = context.canvas, scale = Math.max(w / width, h / height);
    context.drawImage(source, (w - width * scale) / 2, (h - height * scale) / 2, width * scale, height * scale);
}

async function run() {
    if (running) return;
    running = true;
    finished = [];
    try {
        worker.postMessage({ reset: true });
        while (running) {
            if (!paused && player.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) {
                cover(read, player, player.videoWidth, player.videoHeight);
                const pixels = read.getImageData(0, 0, input.width, input.height).data.buffer;
                asking = ask({ frame: pixels }, [pixels]);
                const { person: rgba, milliseconds } = await asking;
                show(new ImageData(new Uint8ClampedArray(rgba), person.width, person.height));
                tell(milliseconds);
            }
            await new Promise(requestAnimationFrame);
        }
    } catch (error) {
        fail("The model stopped", error);
    }
    running = false;
}

async function stop() {
    running = false;
    await asking?.catch(() => {});
    await new Promise(requestAnimationFrame);
}

function tell(milliseconds) {
    finished = [...finished, performance.now()].slice(-SPEED_FRAMES - 1);
    if (finished.length < 2) return;
    const rate = 1000 * (finished.length - 1) / (finished.at(-1) - finished[0]);
    $("speed").textContent = `${rate.toFixed(1)} frames per second, ${milliseconds.toFixed(0)} ms in the network`;
}

// -------------------------------------------------------------------------------------------- background

function show(image) {
    const kind = $("background").value, { width, height } = view;
    if (kind === "alpha") {
        for (let i = 0; i < image.data.length; i += 4) {
            image.data.fill(image.data[i + 3], i, i + 3);
            image.data[i + 3] = 255;
        }
    }
    layer.putImageData(image, 0, 0);
    paint.fillStyle = $("colour").value;
    paint.fillRect(0, 0, width, height);
    if (kind === "blur") {
        small.getContext("2d").drawImage(input, 0, 0, small.width, small.height);
        paint.filter = `blur(${BLUR}px)`;
        paint.drawImage(small, -BLUR, -BLUR, width + 2 * BLUR, height + 2 * BLUR);
        paint.filter = "none";
    } else if (kind === "picture" && picture) cover(paint, picture, picture.width, picture.height);
    paint.drawImage(person, 0, 0);
}

async function setPicture(file) {
    try {
        picture = await createImageBitmap(file);
    } catch {
        return say(`${file.name} cannot be shown as a picture.`, true);
    }
    $("background").value = "picture";
    choose();
}

function choose() {
    for (const kind of ["colour", "picture"]) {
        $(`for-${kind}`).classList.toggle("hidden", $("background").value !== kind);
    }
}

// ------------------------------------------------------------------------------------------------- events

async function take(file) {
    if (!file) return;
    if (file.name.endsWith(".onnx")) return load(await file.arrayBuffer(), file.name);
    if (file.type.startsWith("image/")) return setPicture(file);
    if (!file.type.startsWith("video/")) return say(`${file.name} is neither a model, a video nor a picture.`, true);
    if (!model) return say("Choose a model first, then the video.", true);
    return start(openVideo(file), file.name);
}

for (const id of ["model", "video", "picture"]) $(id).addEventListener("change", event => take(event.target.files[0]));
$("camera").addEventListener("click", () => start(openCamera, "the camera"));
$("pause").addEventListener("click", () => setPaused(!paused));
$("background").addEventListener("change", choose);
addEventListener("dragover", event => {
    event.preventDefault();
    document.body.classList.add("dragging");
});
addEventListener("dragleave", () => document.body.classList.remove("dragging"));
addEventListener("drop", event => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    take(event.dataTransfer.files[0]);
});

// ------------------------------------------------------------------------------------------------ offline

// The service worker keeps the page's files for use offline and allows threads; it takes over after one reload.
async function settle() {
    if (!navigator.serviceWorker) return;
    try {
        await navigator.serviceWorker.register("service.js");
        await navigator.serviceWorker.ready;
    } catch {
        return;                       // a browser that forbids it: the page works, online and on one thread
    }
    if (!self.crossOriginIsolated && !sessionStorage.getItem("reloaded")) {
        sessionStorage.setItem("reloaded", "once");
        location.reload();
        await new Promise(() => {});
    }
}

choose();
await settle();
const files = await (await fetch("files.json")).json();
const served = files.find(name => name.endsWith(".onnx"));
if (served && !model) await load(await (await fetch(served)).arrayBuffer(), served);
document.body.dataset.settled = "yes";
