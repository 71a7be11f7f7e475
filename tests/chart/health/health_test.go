// Package health runs what Flux and Argo CD judge a model by, as manifests/flux and manifests/argocd write it, with these
// tools' own evaluators, over statuses that Freehold wrote: see crds/rules/tests/plan/recorded.rs, which writes them.
package health

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	luajson "layeh.com/gopher-json"
)

const manifests = "../../../manifests/"

// What each tool says where kstatus says this.
var argoSays = map[status.Status]string{
	status.CurrentStatus:    "Healthy",
	status.InProgressStatus: "Progressing",
	status.FailedStatus:     "Degraded",
}

type recording struct {
	Expected status.Status             `json:"expected"`
	Object   unstructured.Unstructured `json:"object"`
}

// What is deleted is Terminating and Progressing before anybody's own words count.
func recordings(t *testing.T) map[string]recording {
	t.Helper()
	paths, err := filepath.Glob("../kstatus/recorded/*.json")
	if err != nil || len(paths) < 20 {
		t.Fatalf("%d recordings: %v", len(paths), err)
	}
	all := map[string]recording{}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var found recording
		if err := json.Unmarshal(text, &found); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if found.Object.GetDeletionTimestamp() == nil {
			all[filepath.Base(path)] = found
		}
	}
	return all
}

// The same object before the operator saw it, by a definition that knows no default for its status.
func statusless(object *unstructured.Unstructured) *unstructured.Unstructured {
	bare := object.DeepCopy()
	unstructured.RemoveNestedField(bare.Object, "status")
	return bare
}

// The same object after an edit that the operator has not seen.
func edited(object *unstructured.Unstructured) *unstructured.Unstructured {
	later := object.DeepCopy()
	later.SetGeneration(later.GetGeneration() + 1)
	return later
}

func documents(t *testing.T, path string) []map[string]any {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	decoder := yaml.NewYAMLOrJSONDecoder(file, 4096)
	var found []map[string]any
	for {
		var document map[string]any
		if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
			return found
		} else if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		found = append(found, document)
	}
}

// The evaluators of the Kustomization that applies models, by kind.
func fluxEvaluators(t *testing.T) map[string]*cel.StatusEvaluator {
	t.Helper()
	evaluators := map[string]*cel.StatusEvaluator{}
	for _, document := range documents(t, manifests+"flux/freehold.yaml") {
		spec, _, _ := unstructured.NestedMap(document, "spec")
		text, err := json.Marshal(spec["healthCheckExprs"])
		if err != nil {
			t.Fatal(err)
		}
		var checks []kustomize.CustomHealthCheck
		if err := json.Unmarshal(text, &checks); err != nil {
			t.Fatal(err)
		}
		for _, check := range checks {
			evaluator, err := cel.NewStatusEvaluator(&check.HealthCheckExpressions)
			if err != nil {
				t.Fatalf("%s: %v", check.Kind, err)
			}
			evaluators[check.Kind] = evaluator
		}
	}
	return evaluators
}

func TestFluxJudgesEveryPhaseAsItIs(t *testing.T) {
	evaluators := fluxEvaluators(t)
	seen := map[status.Status]int{}
	for name, found := range recordings(t) {
		evaluator := evaluators[found.Object.GetKind()]
		if evaluator == nil {
			continue
		}
		judge := func(object *unstructured.Unstructured) status.Status {
			result, err := evaluator.Evaluate(context.Background(), object)
			if err != nil {
				return status.Status(err.Error())
			}
			return result.Status
		}
		said := judge(&found.Object)
		seen[said]++
		if said != found.Expected {
			t.Errorf("%s: Flux says %s, expected %s", name, said, found.Expected)
		}
		if said := judge(edited(&found.Object)); said != status.InProgressStatus {
			t.Errorf("%s after an edit: Flux says %s", name, said)
		}
		// Without the default it is an error, and Flux asks again; it must never be taken for ready.
		if said := judge(statusless(&found.Object)); !strings.Contains(string(said), "no such attribute") {
			t.Errorf("%s without a status: Flux says %s", name, said)
		}
	}
	for _, wanted := range []status.Status{status.CurrentStatus, status.InProgressStatus, status.FailedStatus} {
		if seen[wanted] == 0 {
			t.Errorf("nothing was judged %s", wanted)
		}
	}
}

// As Argo CD runs a script: obj is the object, and what is returned has status and message.
func argoJudges(t *testing.T, script string, object *unstructured.Unstructured) (string, string) {
	t.Helper()
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
	} {
		if err := state.CallByParam(lua.P{Fn: state.NewFunction(open), NRet: 0, Protect: true}, lua.LString(name)); err != nil {
			t.Fatal(err)
		}
	}
	text, err := json.Marshal(object.Object)
	if err != nil {
		t.Fatal(err)
	}
	decoded, err := luajson.Decode(state, text)
	if err != nil {
		t.Fatal(err)
	}
	state.SetGlobal("obj", decoded)
	if err := state.DoString(script); err != nil {
		t.Fatal(err)
	}
	table, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		t.Fatalf("the script returns %s", state.Get(-1).Type())
	}
	return table.RawGetString("status").String(), table.RawGetString("message").String()
}

func TestArgoCDJudgesEveryPhaseAsItIs(t *testing.T) {
	const prefix = "resource.customizations.health.freehold.dev_"
	data, _, _ := unstructured.NestedStringMap(documents(t, manifests+"argocd/health.yaml")[0], "data")
	judged := map[string]int{}
	for name, found := range recordings(t) {
		kind := found.Object.GetKind()
		script, ok := data[prefix+kind]
		if !ok {
			t.Errorf("Argo CD knows no health of %s", kind)
			continue
		}
		judged[kind]++
		expected := argoSays[found.Expected]
		if suspended, _, _ := unstructured.NestedBool(found.Object.Object, "spec", "suspend"); suspended {
			expected = "Suspended"
		}
		for about, given := range map[string]struct {
			object   *unstructured.Unstructured
			expected string
		}{
			"as recorded":      {&found.Object, expected},
			"after an edit":    {edited(&found.Object), "Progressing"},
			"without a status": {statusless(&found.Object), "Progressing"},
		} {
			said, message := argoJudges(t, script, given.object)
			if said != given.expected {
				t.Errorf("%s %s: Argo CD says %s (%s), expected %s", name, about, said, message, given.expected)
			}
			if message == "" || message == "nil" {
				t.Errorf("%s %s: Argo CD has no words for it", name, about)
			}
		}
	}
	for name := range data {
		if kind, ours := strings.CutPrefix(name, prefix); ours && judged[kind] == 0 {
			t.Errorf("no recording judges the script of %s", kind)
		}
	}
}

// Models come in a later wave than the chart: that waits only if the health of an Application is known.
func TestArgoCDKnowsTheHealthOfAnApplication(t *testing.T) {
	data, _, _ := unstructured.NestedStringMap(documents(t, manifests+"argocd/health.yaml")[0], "data")
	script := data["resource.customizations.health.argoproj.io_Application"]
	application := &unstructured.Unstructured{Object: map[string]any{"kind": "Application"}}
	if said, _ := argoJudges(t, script, application); said != "Progressing" {
		t.Errorf("before it is looked at: %s", said)
	}
	for _, health := range []string{"Healthy", "Degraded"} {
		_ = unstructured.SetNestedField(application.Object, health, "status", "health", "status")
		if said, _ := argoJudges(t, script, application); said != health {
			t.Errorf("%s is taken for %s", health, said)
		}
	}
}
