// Drives the page in headless Chromium for test_web.py: node browser.mjs PLAYWRIGHT CHROMIUM URL FOLDER CAMERA.y4m JOB
// FOLDER is Chromium's profile. What was found goes to stdout as JSON.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [playwright, executablePath, url, folder, camera, job, ...rest] = process.argv.slice(2);
const { chromium } = createRequire(`${playwright}/`)("playwright-core");
const context = await chromium.launchPersistentContext(folder, {
    executablePath, headless: true, viewport: { width: 720, height: 840 }, permissions: ["camera"],
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream", `--use-file-for-fake-video-capture=${camera}`],
});
const page = await context.newPage(), complaints = [], foreign = [];
page.on("console", message => message.type() === "error" && complaints.push(message.text()));
page.on("pageerror", error => complaints.push(String(error)));
page.on("request", request => request.url().startsWith(url) || /^(data|blob):/.test(request.url())
    || foreign.push(request.url()));
page.setDefaultTimeout(300_000);

const open = async () => {
    await page.goto(url);
    await page.waitForFunction(() => document.body?.dataset.settled);
};
const text = id => page.locator(`#${id}`).textContent();
// Until frames of a clip come, and the speed is told.
const matting = async what => {
    await page.waitForFunction(name => document.getElementById("message").textContent === `Matting ${name}.`, what);
    const before = await text("speed");
    await page.waitForFunction(old => document.getElementById("speed").textContent !== old
        && document.getElementById("speed").textContent.includes("frames per second"), before);
};
const canvas = () => page.evaluate(() => {
    const view = document.getElementById("view");
    return [...view.getContext("2d").getImageData(0, 0, view.width, view.height).data];
});

const jobs = {
    // Frames of a file, RGBA, through the page's worker, as the page would: the alpha of each, base64.
    async alpha(model, file, size) {
        await open();
        const files = [model, file].map(path => readFileSync(path).toString("base64"));
        return page.evaluate(async ([model, clip, size]) => {
            const decode = async text => (await fetch(`data:application/octet-stream;base64,${text}`)).arrayBuffer();
            const worker = new Worker("worker.mjs", { type: "module" });
            const ask = message => new Promise((resolve, reject) => {
                worker.onmessage = ({ data }) => data.error ? reject(new Error(data.error)) : resolve(data);
                worker.postMessage(message);
            });
            const threads = self.crossOriginIsolated ? 2 : 1;
            const { ready } = await ask({ model: await decode(model), threads });
            const frames = await decode(clip), alphas = [];
            for (let at = 0; at < frames.byteLength; at += size) {
                const { person } = await ask({ frame: frames.slice(at, at + size) });
                const found = new Uint8Array(person).filter((_, i) => i % 4 === 3);
                alphas.push(Array.from(found, byte => String.fromCharCode(byte)).join(""));
            }
            return { ready, alphas: alphas.map(btoa) };
        }, [...files, Number(size)]);
    },
    // By keyboard alone: the camera on, pictures come, pause.
    async camera(screenshot = "", wait = 0) {
        await open();
        const about = await text("about"), isolated = await page.evaluate(() => self.crossOriginIsolated);
        const press = async (id, key) => {
            await page.evaluate(() => document.activeElement.blur());
            for (let i = 0; i < 20; i++) {
                if (await page.evaluate(() => document.activeElement?.id) === id) return page.keyboard.press(key);
                await page.keyboard.press("Tab");
            }
            throw new Error(`Tab does not reach ${id}`);
        };
        await press("camera", "Enter");
        await matting("the camera");
        await press("background", "ArrowDown");
        const chosen = await page.locator("#background").inputValue();
        await page.waitForTimeout(Number(wait));
        if (screenshot) await page.screenshot({ path: screenshot });
        const speed = await text("speed");
        await press("pause", "Space");
        return { about, isolated, chosen, speed, paused: await page.locator("#pause").getAttribute("aria-pressed") };
    },
    // A video and a picture, chosen and dropped; then the alpha alone.
    async files(video, picture) {
        await open();
        await page.setInputFiles("#video", video);
        await matting("clip.webm");
        await page.selectOption("#background", "picture");
        await page.setInputFiles("#picture", picture);
        await page.waitForTimeout(500);
        const behind = await canvas();
        await page.selectOption("#background", "alpha");
        await page.waitForTimeout(500);
        const alpha = await canvas();
        const bytes = readFileSync(video).toString("base64");
        await page.evaluate(async text => {
            const blob = await (await fetch(`data:video/webm;base64,${text}`)).blob(), transfer = new DataTransfer();
            transfer.items.add(new File([blob], "dropped.webm", { type: "video/webm" }));
            dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
        }, bytes);
        await matting("dropped.webm");
        return { behind, alpha };
    },
    // The profile knows the page from an earlier visit; the server is gone.
    async offline() {
        await open();
        return { about: await text("about"), isolated: await page.evaluate(() => self.crossOriginIsolated) };
    },
    // What the page says to files that it cannot use.
    async refusals(...files) {
        await open();
        const said = [];
        for (const file of files) {
            await page.evaluate(() => { document.getElementById("message").textContent = ""; });
            await page.setInputFiles("#model", file);
            await page.waitForFunction(() => document.getElementById("message").className === "error"
                && document.getElementById("message").textContent);
            said.push(await text("message"));
            await page.setInputFiles("#model", []);
        }
        return { said };
    },
};

const found = await jobs[job](...rest);
await context.close();
console.log(JSON.stringify({ ...found, complaints, foreign }));
