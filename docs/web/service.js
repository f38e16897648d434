// Serves the page: from the network, or, offline, from the copy kept on the first visit. To every answer it adds the
// two headers without which a browser gives WebAssembly no threads, so that any plain file server will do.

const CACHE = "vmq";

addEventListener("install", event => event.waitUntil(keep().then(() => skipWaiting())));
addEventListener("activate", event => event.waitUntil(clients.claim()));
addEventListener("fetch", event => {
    const { method, url } = event.request;
    if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event.request));
});

async function keep() {
    const files = await (await fetch("files.json", { cache: "no-cache" })).json();
    await (await caches.open(CACHE)).addAll(["./", "files.json", ...files]);
}

async function answer(request) {
    const cache = await caches.open(CACHE);
    let response;
    try {
        response = await fetch(request);
        if (response.ok) await cache.put(request, response.clone());
    } catch {
        response = await cache.match(request) ?? Response.error();
    }
    if (response.status === 0) return response;
    const headers = new Headers(response.headers);
    headers.set("Cross-Origin-Opener-Policy", "same-origin");
    headers.set("Cross-Origin-Embedder-Policy", "require-corp");
    return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
