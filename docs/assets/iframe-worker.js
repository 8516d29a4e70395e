/* Run a worker's script in a hidden frame where pages are read from a disk: browsers start no workers there. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html>"
      this.frame.addEventListener("load", () => this.start(url), { once: true })
      const add = () => document.body.appendChild(this.frame)
      document.body ? add() : addEventListener("DOMContentLoaded", add)
    }

    async start(url) {
      const inside = this.frame.contentWindow
      const load = source => new Promise((done, fail) => {
        const script = inside.document.createElement("script")
        Object.assign(script, { src: source, onload: done, onerror: fail })
        inside.document.body.appendChild(script)
      })
      inside.importScripts = (...sources) => sources.reduce((before, one) => before.then(() => load(one)), Promise.resolve())
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      await load(url)
      this.send = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      this.waiting.splice(0).forEach(this.send)
    }

    postMessage(data) {
      this.send ? this.send(data) : this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
