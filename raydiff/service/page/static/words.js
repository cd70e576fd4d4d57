/** Numbers and findings as people read them. */

const PLAIN = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const SHORT = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A score: four digits, with an exponent where it is very large or very small. */
export function number(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : PLAIN.format(value);
}

/** A count. */
export const whole = (value) => WHOLE.format(value);

/** A share as a percentage. */
export const percent = (share) => `${SHORT.format(100 * share)}\u00a0%`;

/** Milliseconds, or seconds from 1 on. */
export function duration(ms) {
  return ms >= 1000 ? `${(ms / 1000).toFixed(1)}\u00a0s` : `${ms < 9.95 ? SHORT.format(ms) : WHOLE.format(ms)}\u00a0ms`;
}

/** The verdict as a word. */
export const verdictWord = (verdict) => (verdict === "anomalous" ? "Anomalous" : "Normal");

/** How the score lies to the threshold. */
export function comparison(answer) {
  const side = answer.verdict === "anomalous" ? "above" : "not above";
  return `Score ${number(answer.score)}, ${side} the threshold of ${number(answer.threshold)}.`;
}

/** The conformal p-value in a sentence; its least possible value is 1 / (n + 1) for n calibration images. */
export function pValueSentence(p, numImages) {
  const value = `p\u00a0=\u00a0${SHORT.format(p)}`;
  if (p <= 1.000001 / (numImages + 1)) {
    return `None of the ${whole(numImages)} normal images of the calibration scored as high (${value}).`;
  }
  if (p >= 0.1) {
    return `Of 100 normal images about ${whole(100 * p)} score this high or higher (${value}).`;
  }
  return `About one normal image in ${whole(1 / p)} scores this high or higher (${value}).`;
}

/** What the service found about drift. */
export function driftSentence(drift) {
  const live = whole(drift.num_scores);
  if (drift.claim === "too few scores") {
    return `Too early to say: ${live} of the ${whole(drift.min_scores)} scores it takes.`;
  }
  if (drift.claim === "too few calibration scores") {
    return `Nothing can be said: the artefact was calibrated with ${whole(drift.num_calibration)} images only.`;
  }
  const [low, high] = drift.share_flagged_interval;
  const finding = {
    "stable": "are spread like the calibration's",
    "moderate shift": "have moved somewhat away from the calibration's",
    "major shift": "have moved far away from the calibration's; see what changed, or calibrate anew",
  }[drift.claim];
  const index = `stability index ${SHORT.format(drift.psi)}, by chance up to ${SHORT.format(drift.psi_by_chance)}`;
  const flagged = `${percent(drift.share_flagged)} (95\u00a0% interval ${percent(low)} to ${percent(high)})`;
  const target = `the target is ${percent(drift.target_fpr)} of normal images`;
  return `The last ${live} scores ${finding} (${index}). Flagged: ${flagged}; ${target}.`;
}

/** Whether drift calls for a look: a kind of sign. */
export function driftSign({ claim }) {
  return { "stable": "normal", "moderate shift": "anomalous", "major shift": "anomalous" }[claim] ?? "waiting";
}

/** Where the time of one request went. */
export function timingSentence(answer, tripMs) {
  const { total, ...stages } = answer.timing_ms;
  const parts = Object.entries(stages).map(([stage, ms]) => `${stage} ${duration(ms)}`);
  const inside = total === undefined ? "" : `, ${duration(total)} of it in the service`;
  const batch = answer.batch_size > 1 ? `; in a batch of ${answer.batch_size} images` : "";
  return `${duration(tripMs)} there and back${inside}: ${parts.join(", ")}${batch}.`;
}

/** The page's own view of latency: the median and the slowest of these round trips. */
export function latencySentence(trips) {
  const sorted = [...trips].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  if (sorted.length === 1) return `One request, ${duration(median)} there and back.`;
  return `${sorted.length} requests: ${duration(median)} there and back (median), ${duration(sorted.at(-1))} at most.`;
}
