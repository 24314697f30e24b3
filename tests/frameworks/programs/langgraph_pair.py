"""LangGraph: a ReAct agent with a tool and a plain node, one after the other."""

from asked import MODEL, PLACE, PORTER, SCOUT, STREAM, body, headers, kind_of_place, url
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


def model(role):
    return ChatOpenAI(
        model=MODEL, base_url=url(role), default_headers=headers(role), extra_body=body(role) or None, streaming=STREAM
    )


tools = [tool(kind_of_place)]
scout, porter = model("scout").bind_tools(tools), model("porter")


def speak_scout(state):
    return {"messages": [scout.invoke([SystemMessage(SCOUT), *state["messages"]])]}


def speak_porter(state):
    said = state["messages"][-1].text
    answer = porter.invoke([SystemMessage(PORTER), HumanMessage(f"{PLACE}\nThe scout says: {said}")])
    return {"messages": [answer]}


graph = StateGraph(MessagesState)
graph.add_node("scout", speak_scout)
graph.add_node("tools", ToolNode(tools))
graph.add_node("porter", speak_porter)
graph.add_edge(START, "scout")
graph.add_conditional_edges("scout", tools_condition, {"tools": "tools", END: "porter"})
graph.add_edge("tools", "scout")
graph.add_edge("porter", END)
app = graph.compile()

messages = app.invoke({"messages": [HumanMessage(PLACE)]})["messages"]
print(" ".join(m.text for m in messages[-2:]))
