// The lab's page: what the reader chooses, and what net.js makes of it. Everything is drawn in here, into #lab-root.
(() => {
  "use strict";
  const { lab } = window;
  const root = document.getElementById("lab-root");
  const NAMES = { fgsm: "FGSM", pgd: "PGD", linf: "L∞", l2: "L2" };
  const RANGES = { linf: { max: 0.4, step: 0.01, start: 0.1 }, l2: { max: 6, step: 0.1, start: 1.5 } };
  const PAD = 168; // pixels a side of the drawing: six for each of a digit's
  const SLICE = 12; // milliseconds of computing, after which the page may answer
  const state = { network: "normal", kind: "fgsm", norm: "linf", eps: { linf: 0.1, l2: 1.5 }, blur: false, knows: true,
    refuse: false, threshold: 0.9, digit: 53, drawing: null };

  const find = (selector) => root.querySelector(selector);
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  const later = (wait, action) => {
    let timer;
    return (...given) => {
      clearTimeout(timer);
      timer = setTimeout(action, wait, ...given);
    };
  };

  // ── what is on the page ───────────────────────────────────────────────────────────────────────────────────────────

  const choice = (name, value, text) =>
    `<label><input type="radio" name="lab-${name}" value="${value}"> <span>${text}</span></label>`;

  const picture = (name, title) => `<figure><canvas id="lab-${name}" role="img" width="28" height="28"></canvas>
    <figcaption>${title}</figcaption></figure>`;

  const bar = (name, title) => `<div class="lab-stack"><p id="lab-${name}-text">${title}</p>
    <div id="lab-${name}-bar" aria-hidden="true"><i class="right"></i><i class="refused"></i><i class="wrong"></i></div></div>`;

  const layout = (names, { steps }) => `
    <div class="lab-pick">
      <fieldset><legend>Pick a digit</legend><div class="lab-digits"></div></fieldset>
      <div class="lab-draw"><p id="lab-draw-label">… or draw one, with a finger, pen or mouse</p>
        <canvas id="lab-pad" role="img" aria-labelledby="lab-draw-label" width="${PAD}" height="${PAD}"></canvas>
        <button type="button" id="lab-clear">Clear the drawing</button></div>
    </div>
    <div class="lab-choices">
      <fieldset><legend>Network</legend>${names.map((name) => choice("network", name, name)).join("")}</fieldset>
      <fieldset><legend>In front and behind</legend>
        <label><input type="checkbox" id="lab-blur"> <span>blur the image first</span></label>
        <label class="inner"><input type="checkbox" id="lab-knows"> <span>the attacker knows of the blur</span></label>
        <label><input type="checkbox" id="lab-refuse"> <span>refuse when less sure than&nbsp;<output></output></span></label>
        <input type="range" id="lab-threshold" min="0.5" max="0.99" step="0.01" aria-label="Threshold of refusal"></fieldset>
      <div><fieldset><legend>Attack</legend>${choice("kind", "fgsm", "FGSM, one step")}${choice("kind", "pgd", `PGD, ${steps} steps`)}
        </fieldset><fieldset><legend>Norm</legend>${choice("norm", "linf", "L∞, every pixel")}
        ${choice("norm", "l2", "L2, the whole")}</fieldset></div>
    </div>
    <div class="lab-eps"><label for="lab-eps">ε = <output></output></label><input type="range" id="lab-eps" min="0"></div>
    <div class="lab-pictures">${picture("image", "image")}${picture("change", "change")}${picture("result", "result")}</div>
    <p id="lab-said"></p><p id="lab-status" role="status" class="lab-hidden"></p>
    <table class="lab-table"><caption>Probabilities: <i class="before"></i> image, <i class="after"></i> result</caption>
      <thead><tr><th scope="col">digit</th><td></td><th scope="col">image</th><th scope="col">result</th></tr></thead>
      <tbody>${Array.from({ length: 10 }, (_, k) => `<tr><th scope="row">${k}</th><td aria-hidden="true">
        <i class="before"></i><i class="after"></i></td><td></td><td></td></tr>`).join("")}</tbody></table>
    <div class="lab-all"><p class="lab-title">What is left over the 100 digits above:
      <i class="right"></i> right, <i class="refused"></i> refused, <i class="wrong"></i> wrong</p>
      ${bar("clean", "")}${bar("attacked", "")}
      <progress id="lab-progress" max="100" value="0" aria-label="Digits attacked so far"></progress>
      <p id="lab-all-status" role="status" class="lab-hidden"></p></div>`;

  // ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────

  // An image (28 x 28 numbers) onto a canvas; `colour` makes red, green and blue of a number.
  function paint(canvas, image, colour = (value) => [255 * value, 255 * value, 255 * value]) {
    const pixels = new ImageData(lab.SIDE, lab.SIDE);
    image.forEach((value, i) => pixels.data.set([...colour(value), 255], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  // From -1, blue, over a light ground to 1, orange: colours of helpers.figures.
  const signed = (value) => {
    const [ground, end] = [[250, 250, 247], value < 0 ? [0, 114, 178] : [213, 94, 0]];
    return ground.map((from, k) => from + Math.abs(value) * (end[k] - from));
  };

  // The largest round factor that leaves a change within -1 ... 1.
  function gainOf(change) {
    const largest = change.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    return [100, 50, 20, 10, 5, 2].find((factor) => factor * largest <= 1.0001) ?? 1;
  }

  // A pad to draw on, white on black as these networks know digits; gives back how to clear it.
  function makePad(canvas, changed) {
    const pen = Object.assign(canvas.getContext("2d", { willReadFrequently: true }),
      { lineWidth: PAD / 12, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
    let last = null;
    const draw = (event) => {
      const box = canvas.getBoundingClientRect();
      const here = [(event.clientX - box.left) * PAD / box.width, (event.clientY - box.top) * PAD / box.height];
      pen.beginPath();
      pen.moveTo(...(last ?? here));
      pen.lineTo(...(last = here));
      pen.stroke();
      const { data } = pen.getImageData(0, 0, PAD, PAD);
      changed(lab.prepare(Float64Array.from({ length: PAD ** 2 }, (_, i) => data[4 * i + 3] / 255), PAD));
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      event.preventDefault();
      draw(event);
    });
    // Else a quick stroke counts as a fling, and the browser swallows the tap on a button that follows it.
    canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    canvas.addEventListener("pointermove", (event) => last && draw(event));
    ["pointerup", "pointercancel"].forEach((name) => canvas.addEventListener(name, () => (last = null)));
    return () => pen.clearRect(0, 0, PAD, PAD);
  }

  // ── one image ─────────────────────────────────────────────────────────────────────────────────────────────────────

  // What is deployed, and what the attacker follows: the bare network, where he does not know of the blur.
  function defended({ networks, blur }) {
    const layers = networks[state.network];
    const deployed = { layers, blur: state.blur ? blur : null, threshold: state.refuse ? state.threshold : 0 };
    return { deployed, path: state.blur && !state.knows ? { ...deployed, blur: null } : deployed };
  }

  const threatOf = (record) => ({ norm: state.norm, eps: state.eps[state.norm], kind: state.kind, steps: record.steps });

  function named({ named, sure, refused }, verb) {
    return refused ? `it refuses to answer (it would ${verb}say ${named}, ${percent(sure)} sure)`
      : `it ${verb}says ${named} (${percent(sure)} sure)`;
  }

  // The result in words.
  function sentence(threat, label, before, after) {
    const network = `the ${state.network} network${state.blur ? " behind a blur" : ""}`;
    const what = state.drawing ? `your drawing, taken for a ${label}` : `this ${label}`;
    const first = `Shown ${what}, ${network} answers: ${named(before, "").replace("it says ", "")}.`;
    if (!threat.eps) return `${first} There is no attack: ε is 0.`;
    const lost = !before.refused && before.named !== label;
    const won = !after.refused && after.named !== label;
    const verdict = lost ? "It was wrong without an attack." : won ? "The attack wins." : "The attack fails.";
    const same = !before.refused && after.named === before.named ? "still " : "";
    return `${first} After ${NAMES[threat.kind]} with ${NAMES[threat.norm]}, ε = ${shownEps(threat)}, ${named(after, same)}. ${verdict}`;
  }

  const shownEps = ({ norm, eps }) => eps.toFixed(norm === "linf" ? 2 : 1);

  // The attacker's aim with a drawing is to change what the network sees in it now.
  function labelled(digits, deployed) {
    if (!state.drawing) return digits[state.digit];
    return { image: state.drawing, label: lab.answer(deployed, state.drawing).named };
  }

  function showOne(loaded) {
    const [{ deployed, path }, threat] = [defended(loaded), threatOf(loaded.record)];
    const { image, label } = labelled(loaded.digits, deployed);
    const attacked = threat.eps ? lab.attack(deployed, image, label, threat, { path }).image : image;
    const [before, after] = [image, attacked].map((each) => lab.answer(deployed, each));
    showPictures(image, attacked, before, after);
    showProbabilities(before.probabilities, after.probabilities);
    find("#lab-said").textContent = sentence(threat, label, before, after);
    speak(find("#lab-said").textContent);
  }

  function showPictures(image, attacked, before, after) {
    const change = attacked.map((value, i) => value - image[i]);
    const gain = gainOf(change);
    const texts = { image: `The image; ${named(before, "")}.`, result: `The result; ${named(after, "")}.`,
      change: `The change times ${gain}: orange pixels get lighter, blue ones darker.` };
    paint(find("#lab-image"), image);
    paint(find("#lab-change"), change.map((value) => value * gain), signed);
    paint(find("#lab-result"), attacked);
    Object.entries(texts).forEach(([name, text]) => find(`#lab-${name}`).setAttribute("aria-label", text));
    find("#lab-change + figcaption").textContent = `change ×\u00a0${gain}`;
  }

  function showProbabilities(before, after) {
    root.querySelectorAll(".lab-table tbody tr").forEach((row, k) => {
      const [bars, ...cells] = row.querySelectorAll("td");
      [before, after].forEach((shares, n) => {
        bars.children[n].style.width = `${100 * shares[k]}%`;
        cells[n].textContent = percent(shares[k]);
      });
    });
  }

  // Read out once the reader has stopped moving a slider.
  const speak = later(600, (text) => (find("#lab-status").textContent = text));

  // ── all digits ────────────────────────────────────────────────────────────────────────────────────────────────────

  let turn = 0; // of the last count that was begun; an older one ends

  // Count outcomes over all digits, a slice at a time.
  function showAll(loaded) {
    const [mine, { deployed, path }, threat] = [++turn, defended(loaded), threatOf(loaded.record)];
    const counts = { clean: [0, 0, 0], attacked: [0, 0, 0] };
    let done = 0;
    const slice = () => {
      const start = performance.now();
      while (done < loaded.digits.length && performance.now() - start < SLICE) {
        const { image, label } = loaded.digits[done++];
        const attacked = threat.eps ? lab.attack(deployed, image, label, threat, { path, early: true }).image : image;
        counts.clean[lab.outcome(deployed, image, label)]++;
        counts.attacked[lab.outcome(deployed, attacked, label)]++;
      }
      showCounts(counts, done, threat);
      if (done < loaded.digits.length) setTimeout(() => mine === turn && slice());
    };
    slice();
  }

  function showCounts(counts, done, threat) {
    const attack = `${NAMES[threat.kind]}, ${NAMES[threat.norm]}, ε = ${shownEps(threat)}`;
    const finished = done === root.querySelectorAll(".lab-digits input").length;
    Object.entries({ clean: "Without an attack", attacked: `Under ${attack}` }).forEach(([name, title]) => {
      const [right, refused, wrong] = counts[name];
      [...find(`#lab-${name}-bar`).children].forEach((part, k) => (part.style.width = `${counts[name][k]}%`));
      find(`#lab-${name}-text`).textContent = `${title}: ${right} right, ${refused} refused, ${wrong} wrong`;
    });
    find("#lab-progress").value = done;
    if (!finished) return;
    find(".lab-all").removeAttribute("aria-busy");
    find("#lab-all-status").textContent = find("#lab-attacked-text").textContent;
  }

  // ── what the reader does ──────────────────────────────────────────────────────────────────────────────────────────

  // The controls show the state.
  function showState() {
    for (const name of ["network", "kind", "norm"]) find(`[name=lab-${name}][value="${state[name]}"]`).checked = true;
    for (const name of ["blur", "knows", "refuse"]) find(`#lab-${name}`).checked = state[name];
    const [{ max, step }, eps] = [RANGES[state.norm], shownEps({ norm: state.norm, eps: state.eps[state.norm] })];
    Object.assign(find("#lab-eps"), { max, step, value: state.eps[state.norm], ariaValueText: eps });
    find(".lab-eps output").textContent = eps;
    Object.assign(find("#lab-threshold"), { value: state.threshold, disabled: !state.refuse });
    find("#lab-threshold").ariaValueText = find("#lab-refuse ~ span output").textContent = `${Math.round(100 * state.threshold)}\u00a0%`;
    find("#lab-knows").disabled = !state.blur;
    root.querySelectorAll(".lab-digits input").forEach((input, i) => (input.checked = !state.drawing && i === state.digit));
  }

  function makeDigits(digits) {
    digits.forEach(({ label, image }, i) => {
      const box = document.createElement("label");
      box.innerHTML = `<input type="radio" name="lab-digit" aria-label="${label}, number ${i % 10 + 1} of 10">
        <canvas width="28" height="28" aria-hidden="true"></canvas>`;
      paint(box.querySelector("canvas"), image);
      find(".lab-digits").append(box);
    });
  }

  // What a control that was moved says, put into the state.
  function take(target) {
    const name = target.name || target.id;
    if (name === "lab-digit") state.digit = [...root.querySelectorAll(".lab-digits input")].indexOf(target);
    else if (name === "lab-eps") state.eps[state.norm] = Number(target.value);
    else if (name === "lab-threshold") state.threshold = Number(target.value);
    else state[name.slice(4)] = target.type === "checkbox" ? target.checked : target.value;
  }

  function start(loaded) {
    root.innerHTML = layout(Object.keys(loaded.networks), loaded.record);
    makeDigits(loaded.digits);
    const countAgain = later(250, () => showAll(loaded));
    const renew = () => {
      showState();
      showOne(loaded);
    };
    const change = (changes) => {
      Object.assign(state, changes);
      renew();
      turn++; // what is being counted is of the past
      find(".lab-all").setAttribute("aria-busy", "true");
      countAgain();
    };
    const clear = makePad(find("#lab-pad"), (drawing) => {
      state.drawing = drawing;
      renew();
    });
    const leaveDrawing = () => {
      clear();
      state.drawing = null;
      renew();
    };
    find("#lab-clear").onclick = leaveDrawing;
    root.addEventListener("input", (event) => {
      take(event.target);
      if (event.target.name === "lab-digit") leaveDrawing();
      else change({});
    });
    offerTries(change);
    change({});
  }

  // ── the rest of the page: what to try, and what was measured ──────────────────────────────────────────────────────

  // A button sets the lab as its JSON says.
  function offerTries(change) {
    document.querySelectorAll("button[data-lab]").forEach((button) => {
      button.hidden = false;
      button.onclick = () => {
        const { eps, ...wanted } = JSON.parse(button.dataset.lab);
        const norm = wanted.norm ?? state.norm;
        change({ blur: false, knows: true, refuse: false, ...wanted, eps: { ...state.eps, [norm]: eps } });
        find(".lab-eps").scrollIntoView({ block: "start" });
        find("#lab-eps").focus({ preventScroll: true });
      };
    });
  }

  function showMeasured(place, { networks, eps, steps, digits, tested, created, sigma }) {
    const rows = Object.entries(networks).map(([name, found]) => `<tr><th scope="row">${name}</th>
      ${["clean", "blurred", "fgsm", "pgd"].map((what) => `<td>${percent(found[what])}</td>`).join("")}</tr>`);
    place.innerHTML = `<table class="table"><thead><tr><th scope="col">network</th><th scope="col">right</th>
      <th scope="col">behind a blur</th><th scope="col">FGSM</th><th scope="col">PGD</th></tr></thead>
      <tbody>${rows.join("")}</tbody></table>
      <p>Right: on all ${tested.toLocaleString("en")} test digits; behind a blur: the same, with a Gaussian of ${sigma} pixel
      in front. FGSM and PGD (${steps} steps): right after the attack in L∞ at ε = ${eps}, on the ${digits} digits above.
      Trained and measured on ${created.slice(0, 10)}.</p>`;
  }

  function fail(error) {
    root.innerHTML = `<p role="alert" class="lab-failed">The lab cannot start: of its file of weights,
      <code>_static/lab/weights.js</code>, this is wrong: <span></span>. Load the page again; if that does not help, copy
      the file from the repository again, or make it by <code>python -m helpers lab</code>.</p>`;
    find("span").textContent = error.message;
    document.getElementById("lab-measured").textContent = "Nothing can be shown here without the file of weights.";
  }

  try {
    const loaded = lab.read(window.labData);
    start(loaded);
    showMeasured(document.getElementById("lab-measured"), loaded.record);
  } catch (error) {
    fail(error);
  }
})();
