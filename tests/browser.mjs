// Drives a page in headless Chromium for test_web.py and test_report.py:
// node browser.mjs PLAYWRIGHT CHROMIUM URL FOLDER CAMERA.y4m JOB [WORDS]
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
    // A report at each width: whether the page is wider than the window, and what Tab reaches, in order. Each summary
    // is opened on the way, with Enter and with Space in turn.
    async report(...widths) {
        const found = {};
        for (const width of widths.map(Number)) {
            await page.setViewportSize({ width, height: 800 });
            await page.goto(url);
            const start = page.url(), stops = [];
            let key = "Enter";
            for (; ;) {
                await page.keyboard.press("Tab");
                const stop = await page.evaluate(() => {
                    const focused = document.activeElement;
                    if (focused === document.body) return null;
                    const { left, right, top, bottom } = focused.getBoundingClientRect();
                    const around = focused.parentElement.closest(".scroll, ul")?.getBoundingClientRect();
                    const { outlineStyle, outlineWidth } = getComputedStyle(focused);
                    const shown = document.elementFromPoint(
                        (Math.max(left, 0) + Math.min(right, innerWidth)) / 2,
                        (Math.max(top, 0) + Math.min(bottom, innerHeight)) / 2);
                    return {
                        number: [...document.querySelectorAll("*")].indexOf(focused),
                        name: (focused.getAttribute("aria-label") || focused.textContent).trim().slice(0, 40),
                        tag: focused.tagName, marked: outlineStyle !== "none" && parseFloat(outlineWidth) >= 2,
                        seen: focused.contains(shown) && !(left < around?.left - 1 || right > around?.right + 1),
                    };
                });
                if (!stop) break;
                if (stop.tag === "SUMMARY") {
                    await page.keyboard.press(key);
                    stop.opened = await page.evaluate(() => document.activeElement.parentElement.open) && key;
                    key = key === "Enter" ? "Space" : "Enter";
                }
                stops.push(stop);
            }
            found[width] = { stops, ...await page.evaluate(() => {
                const all = [...document.querySelectorAll("*")], scrolls = element => {
                    const { overflowX, overflowY } = getComputedStyle(element);
                    return overflowX === "auto" && element.scrollWidth > element.clientWidth
                        || overflowY === "auto" && element.scrollHeight > element.clientHeight;
                };
                return {
                    wide: document.documentElement.scrollWidth, window: innerWidth,
                    controls: all.flatMap((e, i) => e.matches("a, button, input, select, summary, [tabindex]") ? [i] : []),
                    scrolling: all.flatMap((e, i) => scrolls(e) && !e.querySelector("a") ? [i] : []),
                };
            }), moved: page.url() !== start };
        }
        return found;
    },
    // The keys that a report knows: a link, a table that scrolls, a head that sorts, the filter.
    async keys(width, word) {
        await page.setViewportSize({ width: Number(width), height: 800 });
        await page.goto(url);
        const at = selector => page.evaluate(s => document.activeElement.matches(s), selector);
        const reach = async selector => {
            for (let i = 0; i < 200; i++) {
                await page.keyboard.press("Tab");
                if (await at(selector)) return;
            }
            throw new Error(`Tab does not reach ${selector}`);
        };
        const rows = () => page.locator("#tensor-table tbody tr:visible th").allTextContents();
        await reach("a.skip");
        await page.keyboard.press("Enter");
        const skipped = new URL(page.url()).hash;
        await reach(".scroll:has(#tensor-table)");
        await page.keyboard.press("End");
        await page.keyboard.press("ArrowRight");
        await page.waitForFunction(() => document.activeElement.scrollLeft > 0 && document.activeElement.scrollTop > 0);
        await reach("#tensor-table th:first-child button");
        await page.keyboard.press("Enter");
        const up = await rows();
        await page.keyboard.press("Space");
        const down = await rows();
        for (let i = 0; !await at("#filters input"); i++) {
            if (i > 9) throw new Error("Shift+Tab does not reach the filter");
            await page.keyboard.press("Shift+Tab");
        }
        await page.keyboard.type(word);
        const named = await rows();
        await page.keyboard.press("Control+A");
        await page.keyboard.press("Delete");
        await page.keyboard.press("Tab");
        await page.keyboard.press("ArrowDown");
        return { skipped, up, down, named, kind: await page.locator("#filters select").first().inputValue(),
            shown: await text("shown"), left: await rows() };
    },
};

const found = await jobs[job](...rest);
await context.close();
console.log(JSON.stringify({ ...found, complaints, foreign }));
